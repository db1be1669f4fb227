"""Function calls and schemas become OpenAI's form, from every form that files have."""

import json

import pytest

from lorasmith.data.rows.calls import are_calls, listed_calls, parse_call, parse_tools, tools_problem

PARAMETERS = {"type": "object", "properties": {"item": {"type": "string"}}}
BARE = {"name": "stock", "description": "Stock", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": BARE}


@pytest.mark.parametrize(
    "given",
    [
        [TOOL],
        TOOL,
        [BARE],
        json.dumps([BARE]),
        [json.dumps(TOOL)],
        [{"function": BARE}],
        [{"type": "function", **BARE}],
        [{"name": "stock", "description": "Stock", "input_schema": PARAMETERS}],
    ],
    ids=["openai", "one", "bare", "text", "list of texts", "no type", "flat", "anthropic"],
)
def test_schemas(given):
    assert tools_problem("tools", given) is None
    assert parse_tools(given) == (TOOL,)


@pytest.mark.parametrize("none", [None, "", [], "[]"])
def test_no_schemas(none):
    assert (tools_problem("functions", none), parse_tools(none)) == (None, ())


@pytest.mark.parametrize(
    ("given", "found"), [("Use the stock.", "text"), (3, "a number"), (["stock"], "a list"), ("[1]", "text")]
)
def test_what_is_no_schema(given, found):
    assert tools_problem("functions", given) == f"'functions' must be a list of function schemas, found {found}."


@pytest.mark.parametrize(
    "given",
    [
        {"type": "function", "function": {"name": "stock", "arguments": {"item": "E27"}}},
        {"name": "stock", "arguments": '{"item": "E27"}'},
        {"name": "stock", "parameters": {"item": "E27"}},
        {"type": "tool_use", "name": "stock", "input": {"item": "E27"}},
    ],
)
def test_calls(given):
    assert are_calls([given])
    assert parse_call(given) == {"type": "function", "function": {"name": "stock", "arguments": {"item": "E27"}}}


def test_calls_as_text_and_calls_that_are_none():
    call = {"name": "stock"}
    assert listed_calls(call) == listed_calls(json.dumps([call])) == listed_calls([call]) == [call]
    assert (listed_calls(None), listed_calls(""), listed_calls([])) == ([], [], [])
    assert parse_call(call | {"id": 1, "arguments": ""})["function"] == {"name": "stock", "arguments": {}}
    for other in (
        listed_calls("stock("),
        [{"name": 1}],
        [{"name": "a", "arguments": "{"}],
        [{"name": "a", "arguments": [1]}],
    ):
        assert not are_calls(other)
