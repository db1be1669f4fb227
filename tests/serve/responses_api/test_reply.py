"""Responses and their streams, through the openai package and a real server."""

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from lorasmith.errors import ModelError
from tests.support.serving import HI, Running, ask, curl, said, user

NUMBER = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
LOOK: Any = {"type": "function", "name": "look", "parameters": NUMBER, "strict": True}
ASKED: dict[str, Any] = {"model": "calm", "input": HI, "max_output_tokens": 12, "temperature": 0}
MESSAGE_EVENTS = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
                  "content_part.done", "output_item.done"]  # fmt: skip
CALL_EVENTS = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
               "output_item.done"]  # fmt: skip


class Pet(BaseModel):
    ok: bool
    kind: Literal["cat", "dog"]


def base_of(served: Running) -> str:
    return str(served.client().models.list().data[0].id)


def kinds(events: list[Any]) -> list[str]:
    """The types of the events, each run of the same type once."""
    named = [event.type.removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(named) if i == 0 or named[i - 1] != kind]


def test_a_response_says_what_a_chat_says(served: Running):
    chat = served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=12, temperature=0)
    reply = served.client().responses.create(**ASKED)
    assert reply.output_text == said(chat)
    assert reply.usage.input_tokens == chat.usage.prompt_tokens
    assert reply.usage.output_tokens == chat.usage.completion_tokens
    assert reply.usage.total_tokens == chat.usage.total_tokens
    ended = chat.choices[0].finish_reason == "stop"
    assert reply.status == ("completed" if ended else "incomplete")
    assert (reply.store, reply.previous_response_id, reply.error) == (False, None, None)
    assert [reply.id[:5], reply.output[0].id[:4]] == ["resp_", "msg_"]


def test_a_reply_that_is_cut_off_is_incomplete(served: Running):
    reply = served.client().responses.create(**ASKED | {"max_output_tokens": 1})
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.output[0].status == "incomplete"


def test_a_stream_has_the_events_of_the_real_api_in_their_order(served: Running):
    whole = served.client().responses.create(**ASKED)
    events = list(served.client().responses.create(**ASKED, stream=True))
    assert kinds(events) == ["created", "in_progress", *MESSAGE_EVENTS, whole.status]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    final = events[-1].response
    assert "".join(deltas) == final.output_text == whole.output_text
    assert len(deltas) > 1
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    assert [item.to_dict() for item in final.output] == [events[-2].item.to_dict()]


def test_events_are_named_for_other_clients(served: Running):
    _status, text = curl(f"{served.url}/v1/responses", "-d", json.dumps(ASKED | {"stream": True}))
    blocks = text.strip().split("\n\n")
    for block in blocks:
        name, _line, data = block.partition("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert "[DONE]" not in text


def test_the_openai_packages_stream_and_parse(served: Running):
    client = served.client()
    parsed = client.responses.parse(model=base_of(served), input="Hi", text_format=Pet)
    assert isinstance(parsed.output_parsed, Pet)
    assert parsed.text.format.type == "json_schema"
    with client.responses.stream(model=base_of(served), input="Hi", text_format=Pet) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Pet)
    assert "".join(texts) == final.output_text


def test_log_probabilities_are_those_of_the_tokens(served: Running):
    asked = ASKED | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = served.client().responses.create(**asked).output[0].content[0]
    assert part.logprobs[0].logprob == part.logprobs[0].top_logprobs[0].logprob  # greedy: the likeliest
    events = list(served.client().responses.create(**asked, stream=True))
    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert told == [one.token for one in part.logprobs][: len(told)]
    assert len(told) > 1
    assert served.client().responses.create(**ASKED).output[0].content[0].logprobs == []


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_call_is_an_item_whole_and_as_it_streams(tooled: Running, choice: Any):
    asked = {"model": base_of(tooled), "input": "Hi", "tools": [LOOK], "tool_choice": choice}
    asked["extra_body"] = {"seed": 5}
    (call,) = tooled.client().responses.create(**asked).output
    assert (call.type, call.name, call.status) == ("function_call", "look", "completed")
    assert json.loads(call.arguments)["n"] in (1, 2)
    events = list(tooled.client().responses.create(**asked, stream=True))
    assert kinds(events) == ["created", "in_progress", *CALL_EVENTS, "completed"]
    (streamed,) = events[-1].response.output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    added = next(event.item for event in events if event.type == "response.output_item.added")
    assert (added.id, added.call_id, added.arguments) == (streamed.id, streamed.call_id, "")


def test_output_goes_back_in_as_input(tooled: Running):
    client, asked = tooled.client(), {"model": base_of(tooled), "tools": [LOOK]}
    items: list[Any] = [{"role": "user", "content": "Hi"}]
    (made,) = client.responses.create(**asked, input=items, tool_choice="required").output
    made.call_id = "1"  # the context of the tiny model is short
    items += [made, {"type": "function_call_output", "call_id": "1", "output": "7"}]
    reply = client.responses.create(**asked, input=items, tool_choice="none", max_output_tokens=4)
    assert reply.output[0].type == "message"


def test_nothing_is_stored(served: Running):
    for method in ("GET", "DELETE"):
        status, body = ask(served, method, "/v1/responses/resp_1")
        assert (status, body["error"]["message"]) == (404, "resp_1: this server stores no responses.")
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        served.client().responses.cancel("resp_1")
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        served.client().responses.input_items.list("resp_1")


def test_an_error_in_a_stream_is_an_event(served: Running, monkeypatch: pytest.MonkeyPatch):
    step, steps = served.manager.worker.engine.step, list[int]()

    def failing() -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise ModelError("the model produced NaN")
        return step()

    monkeypatch.setattr(served.manager.worker.engine, "step", failing)
    _status, text = curl(f"{served.url}/v1/responses", "-d", json.dumps(ASKED | {"stream": True}))
    last = [json.loads(block.partition("data: ")[2]) for block in text.strip().split("\n\n")][-2:]
    assert [event["type"] for event in last] == ["error", "response.failed"]
    assert last[0]["message"] == last[0]["error"]["message"] == "the model produced NaN"
    assert last[1]["response"]["error"] == {"code": "server_error", "message": "the model produced NaN"}
    steps.clear()
    with pytest.raises(openai.APIError, match="NaN"):
        list(served.client().responses.create(**ASKED, stream=True))
