"""Replies of OpenAI's Responses API: the response object, and a stream of numbered events that build it up."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.engine.request import Event
from lorasmith.serve.protocol import Failure
from lorasmith.serve.request_manager import Events
from lorasmith.serve.request_parsing import ParsedRequest
from lorasmith.serve.responses import Choice, Envelope, ScoredToken, chat_logprobs, score_of, with_heartbeats
from lorasmith.serve.responses_api.request import FunctionChoice, ResponsesRequest, renamed
from lorasmith.serve.tool_calls import ToolCallStream

Item = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the request says about its response."""

    body: ResponsesRequest
    envelope: Envelope
    parsed: ParsedRequest

    def response(self, status: str, output: Sequence[Item], **more: Any) -> dict[str, Any]:
        """The response object. `status`: in_progress, completed, incomplete or failed."""
        body, format_ = self.body, self.body.text and self.body.text.format
        choice = body.tool_choice or "auto"
        return {
            "id": self.envelope.id,
            "object": "response",
            "created_at": self.envelope.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None} | (body.reasoning or {}),
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": {"format": format_.model_dump(by_alias=True, exclude_none=True) if format_ else {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
            "tools": [_tool(function) for function in body.functions],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
        } | more

    def ended(self, choice: Choice, output: Sequence[Item]) -> dict[str, Any]:
        """The response object with its usage, once the reply has ended."""
        return self.response(status_of(choice), output, usage=self._usage(choice))

    def logprobs(self, scores: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """The log probabilities of tokens; empty if they were not requested."""
        return list(chat_logprobs(self.envelope.tokenizer, scores)["content"])

    def _usage(self, choice: Choice) -> dict[str, Any]:
        prompt = self.parsed.prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": choice.cached, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + choice.tokens,
        }


def response_body(answer: Answer, choice: Choice) -> dict[str, Any]:
    """The response to a request that is not streamed."""
    text, calls = answer.envelope.calls_in(choice.text)
    output = [_call(_new_id("fc"), call) for call in calls]
    if text or not calls:
        part = _part(text, answer.logprobs(choice.scores))
        output.insert(0, _message(_new_id("msg"), status_of(choice), [part]))
    return answer.ended(choice, output)


async def response_stream(events: Events, answer: Answer) -> AsyncIterator[str]:
    """The server-sent events of a response, in the order of OpenAI's API. An error is sent as an event."""
    stream = _Stream(answer)
    try:
        yield stream.event("response.created", response=answer.response("in_progress", []))
        yield stream.event("response.in_progress", response=answer.response("in_progress", []))
        async for line in with_heartbeats(events, stream.take):
            yield line
    except Failure as failure:
        for line in stream.failed(renamed(failure)):
            yield line


class _Stream:
    """The events of one response: a message, opened with its first text, and then the tool calls."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._number = answer, 0
        self._choice, self._output = Choice(), list[Item]()
        asked = answer.envelope.asked
        self._calls = ToolCallStream(asked.must_call) if asked is not None and asked.offered else None
        self._message_id: str | None = None  # of the message that is being streamed
        self._text, self._waiting = "", ""  # sent; blank text that may precede a tool call
        self._scores = list[ScoredToken]()  # of tokens whose text is not sent yet

    def event(self, kind: str, **values: Any) -> str:
        """A numbered event."""
        body = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"

    def take(self, _index: int, event: Event) -> Iterator[str]:
        """The events for a token; after the last one, those that end the response."""
        self._choice.take(event)
        score = score_of(event)
        self._scores += [score] if score else []
        self._waiting += event.text if self._calls is None else self._calls.push(event.text)
        if self._waiting.strip() or (self._waiting and self._message_id):
            yield from self._send()
        if event.finish:
            yield from self._end()

    def failed(self, failure: Failure) -> Iterator[str]:
        """The events for an error. The first has its fields twice, as the API's reference and its server have them."""
        error = failure.body["error"]
        named = {key: error[key] for key in ("code", "message", "param")}
        yield self.event("error", **named, error=error)
        why = {"code": "server_error" if failure.status >= 500 else "invalid_prompt", "message": error["message"]}
        yield self.event("response.failed", response=self._answer.response("failed", self._output, error=why))

    def _send(self) -> Iterator[str]:
        """Send the text that is waiting, in a message."""
        place = {"output_index": 0, "content_index": 0}
        if self._message_id is None:
            self._message_id = _new_id("msg")
            yield self.event(
                "response.output_item.added", output_index=0, item=_message(self._message_id, "in_progress", [])
            )
            yield self.event("response.content_part.added", item_id=self._message_id, **place, part=_part("", []))
        if self._waiting:
            logprobs = self._answer.logprobs(self._scores)
            yield self.event(
                "response.output_text.delta",
                item_id=self._message_id, **place, delta=self._waiting, logprobs=logprobs,
            )  # fmt: skip
        self._text += self._waiting
        self._waiting, self._scores = "", []

    def _end(self) -> Iterator[str]:
        rest, calls = ("", []) if self._calls is None else self._answer.envelope.calls_in(self._calls.close())
        if not calls:
            self._waiting += rest
        if self._message_id is not None or not calls:
            if self._waiting or self._message_id is None:
                yield from self._send()
            yield from self._end_message()
        for call in calls:
            yield from self._send_call(call)
        status = status_of(self._choice)
        yield self.event(f"response.{status}", response=self._answer.ended(self._choice, self._output))

    def _end_message(self) -> Iterator[str]:
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        part = _part(self._text, self._answer.logprobs(self._choice.scores))
        item = _message(str(self._message_id), status_of(self._choice), [part])
        self._output.append(item)
        yield self.event("response.output_text.done", **place, text=self._text, logprobs=part["logprobs"])
        yield self.event("response.content_part.done", **place, part=part)
        yield self.event("response.output_item.done", output_index=0, item=item)

    def _send_call(self, call: dict[str, Any]) -> Iterator[str]:
        item = _call(_new_id("fc"), call)
        place = {"item_id": item["id"], "output_index": len(self._output)}
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self.event("response.output_item.added", output_index=place["output_index"], item=begun)
        yield self.event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield self.event("response.function_call_arguments.done", **place, **done)
        yield self.event("response.output_item.done", output_index=place["output_index"], item=item)
        self._output.append(item)


def status_of(choice: Choice) -> str:
    """The status of a response, and of its message."""
    return "incomplete" if choice.finish == "length" else "completed"


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _message(number: str, status: str, content: list[dict[str, Any]]) -> Item:
    return {"id": number, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call(number: str, call: dict[str, Any]) -> Item:
    """A tool call of chat as an item."""
    named = {"call_id": call["id"], **call["function"]}
    return {"id": number, "type": "function_call", "status": "completed", **named}


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "description": None, "parameters": {}, "strict": False} | function
