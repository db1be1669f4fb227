"""Tool calls in the text of a reply, whole and as it streams."""

import json

import pytest

from lorasmith.serve.tool_calls import ToolCallStream, parse_tool_calls


def test_calls_of_tools_are_read_where_they_are_json():
    text = 'Well.\n<tool_call>\n{"name": "find", "arguments": {"word": "猫"}}\n</tool_call>'
    content, calls = parse_tool_calls(text)
    assert content == "Well."
    assert calls[0]["function"] == {"name": "find", "arguments": '{"word": "猫"}'}
    assert parse_tool_calls("<tool_call>find</tool_call>") == ("<tool_call>find</tool_call>", [])
    held = ToolCallStream()
    assert "".join(map(held.push, text)) == "Well.\n"
    assert parse_tool_calls(held.close())[1][0]["function"]["name"] == "find"


@pytest.mark.parametrize(
    "text", ["<tool_call>[1]</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "2 < 3", ""]
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


def test_a_stream_withholds_only_what_may_begin_a_call() -> None:
    stream = ToolCallStream()
    assert [stream.push(text) for text in ("a <too", "l> b <", "tool_call", ">{")] == ["a ", "<tool> b ", "", ""]
    assert stream.close() == "<tool_call>{"


def test_a_reply_that_is_a_call_is_read_without_its_tags() -> None:
    """The tags are special tokens of some models, which are left out of the text."""
    for text in ('\n{"name": "f", "arguments": {"x": 1}}\n', '<tool_call>\n{"name": "f", "arguments": {"x": 1}}'):
        content, (call,) = parse_tool_calls(text, is_call=True)
        assert (content, call["function"]) == ("", {"name": "f", "arguments": '{"x": 1}'})
        stream = ToolCallStream(is_call=True)
        assert [stream.push(text), stream.close()] == ["", text]
    assert parse_tool_calls('{"name": "f", "argu', is_call=True) == ('{"name": "f", "argu', [])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x": 1}, '{"x": 1}'),
        ('{"x": 1}', '{"x": 1}'),  # already a JSON text: not encoded once more
        ("x", '"x"'),
        ("[1]", '"[1]"'),
    ],
)
def test_arguments_are_a_json_text_once(arguments: object, text: str) -> None:
    call = json.dumps({"name": "f", "arguments": arguments})
    assert parse_tool_calls(f"<tool_call>{call}</tool_call>")[1][0]["function"]["arguments"] == text


def test_several_calls_and_one_without_its_end() -> None:
    text = 'A <tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "g", "parameters": {"x": 1}}'
    content, calls = parse_tool_calls(text)
    assert content == "A"
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": "{}"},
        {"name": "g", "arguments": '{"x": 1}'},
    ]
    assert len({call["id"] for call in calls}) == 2
