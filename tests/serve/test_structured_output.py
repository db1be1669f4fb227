"""Replies that must follow a schema or call a function, through the openai package and a real server."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.support.serving import Running, said, user

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
NUMBER = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": NUMBER}}
WAIT: Any = {"type": "function", "function": {"name": "wait", "parameters": NOTHING}}
NAMED: Any = {"type": "function", "function": {"name": "look"}}


def chat(served: Running, **options: Any) -> Any:
    given = {"model": served.client().models.list().data[0].id, "messages": user("Hi"), "seed": 1}
    return served.client().chat.completions.create(**(given | options))


class Answer(BaseModel):
    ok: bool
    kind: Literal["cat", "dog"]


@pytest.mark.parametrize("seed", range(4))
def test_a_reply_follows_its_schema(served: Running, seed: int) -> None:
    reply = chat(served, response_format=STRICT, seed=seed)
    assert Answer.model_validate_json(said(reply))
    assert reply.choices[0].finish_reason == "stop"


def test_the_parser_of_the_openai_package(served: Running) -> None:
    model = served.client().models.list().data[0].id
    reply = served.client().chat.completions.parse(model=model, messages=user("Hi"), response_format=Answer, seed=3)
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_free_and_restricted_replies_in_one_batch_are_those_of_each_alone(served: Running) -> None:
    asked: list[dict[str, Any]] = [{"response_format": STRICT}, {}, {"response_format": {"type": "json_object"}}, {}]
    asked = [one | {"seed": i, "temperature": 0.8} for i, one in enumerate(asked)]
    alone = [said(chat(served, **one)) for one in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda one: said(chat(served, **one)), asked)) == alone


@pytest.mark.parametrize(
    ("tools", "choice", "names", "finish"),
    [
        ([LOOK, WAIT], "required", {"look", "wait"}, "tool_calls"),
        ([LOOK, WAIT], NAMED, {"look"}, "stop"),
        ([LOOK], "required", {"look"}, "tool_calls"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_call_is_made_where_one_is_asked_for(tooled: Running, tools, choice, names, finish, seed) -> None:
    reply = chat(tooled, tools=tools, tool_choice=choice, seed=seed).choices[0]
    (call,) = reply.message.tool_calls
    assert call.function.name in names
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "wait" or arguments in ({"n": 1}, {"n": 2})
    assert (reply.message.content, reply.finish_reason) == (None, finish)


def test_a_streamed_call_is_that_of_the_whole_reply(tooled: Running) -> None:
    options: dict[str, Any] = {"tools": [LOOK], "tool_choice": "required", "seed": 5}
    (whole,) = chat(tooled, **options).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in chat(tooled, stream=True, **options) if chunk.choices]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == (whole.function.name, whole.function.arguments)
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_older_form_of_functions(tooled: Running) -> None:
    reply = chat(tooled, functions=[LOOK["function"]], function_call={"name": "look"}).choices[0]
    assert reply.message.function_call.name == "look"
    assert json.loads(reply.message.function_call.arguments)["n"] in (1, 2)


def test_no_call_is_made_where_none_is_wanted(tooled: Running) -> None:
    reply = chat(tooled, tools=[LOOK], tool_choice="none", messages=user("<tool_call>")).choices[0]
    assert reply.message.tool_calls is None


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "cat"},
                                                                     "strict": True}}},
         "response_format", "replies cannot be restricted to this schema"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "other"}}},
         "tool_choice", "the reply must call other, but the functions in tools are: look"),
        ({"extra_body": {"tool_choice": "required"}}, "tool_choice", "must call a function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}], "tool_choice": "required"},
         "tools", "each tool must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(tooled: Running, options, param, says) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        chat(tooled, **options)
    assert caught.value.param == param


def test_the_bias_of_a_token_decides(served: Running) -> None:
    tokenizer = served.manager.registry.base.tokenizer
    token = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    assert said(chat(served, logit_bias={str(token): 100}, max_tokens=5, temperature=0)) == "aaaaa"
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        chat(served, logit_bias={"999999": 1})


def test_a_reply_goes_on_with_the_last_answer(served: Running) -> None:
    begun = [*user("Hi"), {"role": "assistant", "content": "Mice"}]
    whole = chat(served, messages=begun, temperature=0, max_tokens=8)
    tokens = whole.usage.prompt_tokens
    assert tokens > chat(served, temperature=0, max_tokens=8).usage.prompt_tokens
    assert whole.choices[0].message.content is not None


def test_replies_have_what_the_real_api_has(served: Running) -> None:
    first, second = (chat(served, temperature=0, max_tokens=4) for _time in range(2))
    assert first.system_fingerprint == second.system_fingerprint
    assert first.id != second.id
    assert second.usage.completion_tokens_details.reasoning_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 0
    assert said(first) == said(second)
