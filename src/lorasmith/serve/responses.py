"""Building responses in OpenAI's format: complete JSON bodies, and streams of server-sent events.

`usage` counts the stop token as part of the reply.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.request import Event
from lorasmith.engine.sampling.logprobs import TokenLogprobs
from lorasmith.serve.protocol import ChatRequest, Failure, FunctionName, StreamOptions
from lorasmith.serve.request_manager import HEARTBEAT, Events
from lorasmith.serve.request_parsing import ParsedRequest
from lorasmith.serve.tool_calls import ToolCallStream, parse_tool_calls

# A token id, its logprob (None for the first token of a prompt), and the most likely token ids with their logprobs.
ScoredToken = tuple[int, float | None, Sequence[tuple[int, float]]]
ID_PREFIXES = {"chat.completion": "chatcmpl-", "text_completion": "cmpl-", "response": "resp_"}


def score_of(event: Event) -> ScoredToken | None:
    """The logprobs of a new token, if they were requested."""
    logprobs = event.logprobs
    return None if logprobs is None else (event.token, logprobs.logprob, logprobs.top)


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The `logprobs` of a chat completion: {"content": [{"token", "logprob", "bytes", "top_logprobs"}]}."""

    def one(token: int, value: float | None) -> dict[str, Any]:
        text = str(tokenizer.decode([token]))
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [one(token, own) | {"top_logprobs": [one(*pair) for pair in top]} for token, own, top in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[ScoredToken], offset: int = 0
) -> dict[str, Any]:
    """The `logprobs` of a completion: {"tokens", "token_logprobs", "top_logprobs", "text_offset"}.

    `offset`: the position of the first token in the text.
    """
    texts, offsets, tops = [], [], []
    for token, own, top in tokens:
        texts.append(str(tokenizer.decode([token])))
        offsets.append(offset)
        offset += len(texts[-1])
        likeliest: dict[str, float] = {}
        for other, value in top:  # most likely first; if tokens have the same text, the first one counts
            likeliest.setdefault(str(tokenizer.decode([other])), value)
        tops.append(None if own is None else likeliest)
    own_values = [own for _token, own, _top in tokens]
    return {"tokens": texts, "token_logprobs": own_values, "top_logprobs": tops, "text_offset": offsets}


def scored_prompt(ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[ScoredToken]:
    """The tokens of a prompt with their logprobs from engine/scoring.py."""
    pairs = zip(ids, logprobs, strict=True)
    return [(token, None, ()) if one is None else (token, one.logprob, one.top) for token, one in pairs]


@dataclass
class Choice:
    """One choice of a response, built up token by token."""

    text: str = ""
    tokens: int = 0
    cached: int = 0  # of the prompt's tokens, those that were in the prefix cache
    scores: list[ScoredToken] = field(default_factory=list)
    finish: str | None = None

    def take(self, event: Event) -> None:
        """Add a token."""
        self.text += event.text
        self.tokens += 1
        self.finish, self.cached = event.finish, event.cached
        self.scores += [score] if (score := score_of(event)) else []


@dataclass(frozen=True)
class Envelope:
    """What all chunks of a response have in common. `kind`: one of ID_PREFIXES; `asked`: of a chat."""

    kind: str
    model: str
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    asked: ChatRequest | None = None
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """The id of the response, with OpenAI's prefixes."""
        return ID_PREFIXES[self.kind] + self.number

    def body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a chunk of a stream, with these choices."""
        chunk = ".chunk" if self.kind == "chat.completion" and choices and "delta" in choices[0] else ""
        named = {"id": self.id, "object": self.kind + chunk, "created": self.created, "model": self.model}
        return named | {"system_fingerprint": self.fingerprint, "choices": choices} | more

    def calls_in(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text of a chat reply without its tool calls, and the calls."""
        asked = self.asked
        if asked is None or not asked.offered:
            return text, []
        text, calls = parse_tool_calls(text, asked.must_call)
        return text, calls[:1] if asked.functions or asked.parallel_tool_calls is False else calls

    def told(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """The calls as a message has them: OpenAI's older form if the request used it."""
        is_older = self.asked is not None and self.asked.functions
        return {"function_call": calls[0]["function"]} if is_older else {"tool_calls": calls}

    def finish(self, calls: list[dict[str, Any]], finish: str | None) -> str | None:
        """The `finish_reason` of a reply with these calls; like OpenAI's, it is 'stop' if the function was named."""
        if not calls or self.asked is None:
            return finish
        is_named = isinstance(self.asked.choice, FunctionName)
        return "stop" if is_named else "function_call" if self.asked.functions else "tool_calls"


async def collect(events: Events, count: int) -> list[Choice]:
    """All choices, once they are complete."""
    choices = [Choice() for _choice in range(count)]
    async for item in events:
        if item is not None:
            choices[item[0].index].take(item[1])
    return choices


def usage(parsed: ParsedRequest, tokens: int, cached: Sequence[int]) -> dict[str, Any]:
    """The `usage` of a response. `cached`: tokens of each choice's prompt that were in the prefix cache."""
    prompt = parsed.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cached[:: parsed.n]), "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def usage_of(parsed: ParsedRequest, choices: Sequence[Choice]) -> dict[str, Any]:
    """The `usage` of a response with these choices."""
    return usage(parsed, sum(choice.tokens for choice in choices), [choice.cached for choice in choices])


def chat_body(envelope: Envelope, choices: Sequence[Choice], parsed: ParsedRequest) -> dict[str, Any]:
    """The response to a chat request."""
    made = []
    for index, choice in enumerate(choices):
        text, calls = envelope.calls_in(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        if calls:
            message |= {"content": text or None} | envelope.told(calls)
        finish = envelope.finish(calls, choice.finish)
        own = chat_logprobs(envelope.tokenizer, choice.scores) if choice.scores else None
        made.append({"index": index, "message": message, "logprobs": own, "finish_reason": finish})
    return envelope.body(made, usage=usage_of(parsed, choices))


def completion_body(
    envelope: Envelope,
    choices: Sequence[Choice],
    parsed: ParsedRequest,
    echo: Sequence[str],
    scores: Sequence[list[ScoredToken]],
) -> dict[str, Any]:
    """The response to a completion request.

    `echo`: the texts of the prompts, `scores`: the logprobs of their tokens; empty if not requested.
    """
    made = []
    for index, choice in enumerate(choices):
        before = echo[index // parsed.n] if echo else ""
        tokens = [*(scores[index // parsed.n] if scores else []), *choice.scores]
        offset = 0 if scores else len(before)
        own = completion_logprobs(envelope.tokenizer, tokens, offset) if tokens else None
        text = before + choice.text
        made.append({"index": index, "text": text, "logprobs": own, "finish_reason": choice.finish or "length"})
    return envelope.body(made, usage=usage_of(parsed, choices))


async def chat_stream(
    events: Events, envelope: Envelope, parsed: ParsedRequest, options: StreamOptions | None
) -> AsyncIterator[str]:
    """The server-sent events of a chat request. An error is sent as an event."""
    count = len(parsed.requests)
    asked = envelope.asked
    tool_streams = list[ToolCallStream]()
    if asked is not None and asked.offered:
        tool_streams = [ToolCallStream(asked.must_call) for _choice in range(count)]
    first = [_delta(index, {"role": "assistant", "content": "", "refusal": None}) for index in range(count)]

    def deltas(index: int, event: Event) -> Iterator[dict[str, Any]]:
        text, calls = event.text, list[dict[str, Any]]()
        if tool_streams:
            text = tool_streams[index].push(event.text)
        score = score_of(event)
        own = chat_logprobs(envelope.tokenizer, [score]) if score else None
        if text or own:
            yield _delta(index, {"content": text}, own)
        if event.finish:
            if tool_streams:
                rest, calls = envelope.calls_in(tool_streams[index].close())
                yield _delta(index, envelope.told(_numbered(calls)) if calls else {"content": rest})
            yield _delta(index, {}, finish=envelope.finish(calls, event.finish))

    async for piece in _stream(events, envelope, parsed, options, first, deltas):
        yield piece


async def completion_stream(
    events: Events, envelope: Envelope, parsed: ParsedRequest, options: StreamOptions | None, echo: Sequence[str]
) -> AsyncIterator[str]:
    """The server-sent events of a completion request. An error is sent as an event."""
    lengths = [len(echo[index // parsed.n]) if echo else 0 for index in range(len(parsed.requests))]
    first = [_piece(index, echo[index // parsed.n]) for index in range(len(lengths))] if echo else []

    def pieces(index: int, event: Event) -> Iterator[dict[str, Any]]:
        score = score_of(event)
        own = completion_logprobs(envelope.tokenizer, [score], lengths[index]) if score else None
        lengths[index] += len(event.text)
        if event.text or own or event.finish:
            yield _piece(index, event.text, own, event.finish)

    async for piece in _stream(events, envelope, parsed, options, first, pieces):
        yield piece


async def _stream(
    events: Events,
    envelope: Envelope,
    parsed: ParsedRequest,
    options: StreamOptions | None,
    first: list[dict[str, Any]],
    pieces: Callable[[int, Event], Iterator[dict[str, Any]]],
) -> AsyncIterator[str]:
    wants_usage = options is not None and (options.include_usage or options.continuous_usage_stats)
    is_continuous = options is not None and options.continuous_usage_stats
    tokens, cached = 0, [0] * len(parsed.requests)

    def chunk(choice: dict[str, Any]) -> str:
        counted = {"usage": usage(parsed, tokens, cached) if is_continuous else None} if wants_usage else {}
        return _event(envelope.body([choice], **counted))

    def chunks(index: int, event: Event) -> Iterator[str]:
        nonlocal tokens
        tokens += 1
        cached[index] = event.cached
        yield from map(chunk, pieces(index, event))

    try:
        for choice in first:
            yield chunk(choice)
        async for line in with_heartbeats(events, chunks):
            yield line
    except Failure as failure:
        yield _event(failure.body)
        return
    if options is not None and options.include_usage:
        kind = {"object": "chat.completion.chunk"} if envelope.kind == "chat.completion" else {}
        yield _event(envelope.body([], usage=usage(parsed, tokens, cached)) | kind)
    yield "data: [DONE]\n\n"


async def with_heartbeats(events: Events, lines: Callable[[int, Event], Iterator[str]]) -> AsyncIterator[str]:
    """The `lines` of each event of a choice, and comments while there is nothing to send."""
    sent = time.monotonic()
    async for item in events:
        for line in () if item is None else lines(item[0].index, item[1]):
            yield line
            sent = time.monotonic()
        if time.monotonic() - sent >= HEARTBEAT:  # also while a tool call is withheld
            yield ": still at it\n\n"
            sent = time.monotonic()


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _piece(index: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _numbered(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"index": index} | call for index, call in enumerate(calls)]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
