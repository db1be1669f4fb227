"""Tool calls in the text of a reply, whole and as it streams."""

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
    assert held.close()[1][0]["function"]["name"] == "find"


@pytest.mark.parametrize(
    "text", ["<tool_call>[1]</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "2 < 3", ""]
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


def test_a_stream_withholds_only_what_may_begin_a_call() -> None:
    stream = ToolCallStream()
    assert [stream.push(text) for text in ("a <too", "l> b <", "tool_call", ">{")] == ["a ", "<tool> b ", "", ""]
    assert stream.close() == ("<tool_call>{", [])


def test_several_calls_and_one_without_its_end() -> None:
    text = 'A <tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "g", "parameters": {"x": 1}}'
    content, calls = parse_tool_calls(text)
    assert content == "A"
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": "{}"},
        {"name": "g", "arguments": '{"x": 1}'},
    ]
    assert len({call["id"] for call in calls}) == 2
