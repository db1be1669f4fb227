"""Requests of the Responses API as chat requests, and what is wrong with those that have no such meaning."""

from typing import Any

import openai
import pytest

from lorasmith.serve.protocol import Failure
from lorasmith.serve.responses_api.request import ResponsesRequest, chat_request, renamed
from tests.support.serving import HI, Running

TOOL: dict[str, Any] = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}


def chat(**values: Any) -> dict[str, Any]:
    """What is set in the chat request of this request."""
    return chat_request(ResponsesRequest(model="m", **values)).model_dump(exclude_unset=True, exclude_none=True)


def call(number: str) -> dict[str, Any]:
    return {"type": "function_call", "id": "fc_" + number, "call_id": number, "name": "look", "arguments": "{}"}


def test_text_is_a_message_after_the_instructions():
    assert chat(input=HI, instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": HI},
    ]


def test_items_are_messages_and_an_answer_is_one_with_its_calls():
    part = {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "It thinks."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]},
        call("1"),
        call("2"),
        {"type": "function_call_output", "call_id": "1", "output": "7"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "8"}]},
        call("3"),
    ]
    calls = [{"id": i, "type": "function", "function": {"name": "look", "arguments": "{}"}} for i in "123"]
    assert chat(input=items)["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": [{"type": "text", "text": "Let me look."}],
            "tool_calls": calls[:2],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "8"}]},
        {"role": "assistant", "tool_calls": calls[2:]},
    ]


def test_the_other_fields_have_chats_names():
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    made = chat(
        input=HI, tools=[TOOL], tool_choice={"type": "function", "name": "look"}, text={"format": form},
        max_output_tokens=9, include=["message.output_text.logprobs"], top_logprobs=2, top_p=0.5, min_p=0.1, seed=4,
        parallel_tool_calls=False,
    )  # fmt: skip
    function = {key: TOOL[key] for key in ("name", "parameters", "strict")}
    wanted = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "response_format": {"type": "json_schema", "json_schema": {"schema_": {"type": "object"}, "strict": True}},
        "max_tokens": 9, "logprobs": True, "top_logprobs": 2, "top_p": 0.5, "min_p": 0.1, "seed": 4,
        "parallel_tool_calls": False,
    }  # fmt: skip
    assert {key: made[key] for key in wanted} == wanted
    assert "logprobs" not in chat(input=HI, top_logprobs=0)


def test_what_changes_nothing_is_accepted(served: Running):
    served.client().responses.create(
        model="calm", input=HI, max_output_tokens=4, background=False, store=True, metadata={"a": "b"}, user="u",
        reasoning={"effort": "low"}, truncation="auto", include=["reasoning.encrypted_content"], max_tool_calls=3,
        service_tier="auto", prompt_cache_key="k", safety_identifier="s", text={"verbosity": "low"},
        previous_response_id=None, extra_body={"n": 1, "context_management": []},
    )  # fmt: skip


LONG = "word " * 300


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses. Send the earlier messages"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"extra_body": {"max_tokens": 5}}, "max_tokens", "Did you mean 'max_output_tokens'"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": LONG}, None, "tokens"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "function_call_output"),
        ({"input": [{"content": "x"}]}, "input[0].role", "must be text"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content", "must be text or a list of parts"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
         "input[0].content[0]", "'input_image'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "stores no items"),
        ({"input": [{"type": "computer_call"}]}, "input[0]", "'computer_call' is not supported"),
        ({"input": [call("1") | {"arguments": None}]}, "input[0].arguments", "must be text"),
        ({"input": [*[{"role": "user", "content": HI}], call("1") | {"arguments": "{"}]}, "input", "^.*input: "),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1]", "'web_search' is not supported"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0]", "a function must be"),
        ({"tools": [TOOL]}, "input", "the template has no place for 'tools'"),
        ({"tool_choice": "required"}, "tool_choice", "must call a function"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "schema is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "cat"}, "strict": True}}},
         "text.format", "text.format: replies cannot be restricted to this schema"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(served: Running, changes: dict[str, Any], param: str | None, says: str):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        served.client().responses.create(**{"model": "calm", "input": HI} | changes)
    assert caught.value.param == param


def test_an_error_keeps_all_but_the_names():
    made = renamed(Failure(429, "full", None, "queue_full", 7))
    assert (made.status, made.text, made.param, made.code, made.retry) == (429, "full", None, "queue_full", 7)
    assert renamed(Failure(400, "messages: odd", "messages")).text == "input: odd"
    assert renamed(Failure(400, "no place for messages", "messages")).text == "no place for messages"
