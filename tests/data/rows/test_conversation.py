"""Messages for a template, types and places for people, and the collection of problems."""

import pytest

from lorasmith.data.rows.conversation import MAX_LISTED, Problems, Record, RowError, places, quoted, type_name
from lorasmith.data.rows.formats import to_conversation
from lorasmith.errors import DataError
from tests.support.row_files import problems

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def test_a_template_sees_the_tool_keys_that_are_set_and_nothing_else():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "c1"}], "learn": False},
        {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Sunny.", "weight": 0.5},
    ]
    found = to_conversation(Record({"messages": messages}, "a:1")).messages
    assert [message._asdict() for message in found] == [
        messages[0],
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
        messages[2],
        {"role": "assistant", "content": "Sunny."},
    ]
    assert [(message.learn, message.weight) for message in found] == [(True, 1), (False, 1), (True, 1), (True, 0.5)]


def test_many_different_faults_are_counted_after_the_twentieth(write):
    texts = problems(write("a.jsonl", [{f"key{n}": 1} for n in range(MAX_LISTED + 7)]))
    assert len(texts) == MAX_LISTED + 1
    assert texts[-1] == "data.data: 7 more rows have problems."


def test_places_of_several_files():
    assert places(["a:b.json:3", "d row 4", "a:b.json:7", "x"]) == "a:b.json lines 3, 7; d row 4; x"
    assert places([f"a:{n}" for n in (9, 1, 2, 3, 5, 6)], most=1) == "a lines 1-3 and 3 more"  # rows, not runs
    Problems("data.data").raise_any()  # nothing found, nothing raised


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "null"), (True, "true or false"), (0, "a number"), (0.5, "a number"), ("", "text"), ([], "a list"),
     ((), "a list"), ({}, "an object")],
)  # fmt: skip
def test_types_have_names(value, name):
    assert type_name(value) == name


def test_keys_are_quoted():
    assert (quoted([]), quoted(["a", 3])) == ("", "'a', '3'")


def test_a_row_error_says_where_if_that_is_known():
    error = RowError("a.jsonl:3", "it is empty.")
    assert (str(error), error.source, error.text) == ("a.jsonl line 3: it is empty.", "a.jsonl:3", "it is empty.")
    assert str(RowError("", "it is empty.")) == "it is empty."


def test_the_same_problem_of_several_rows_is_one_line():
    found = Problems("data.data")
    for source, text in (("a:2", "empty."), ("a:7", "long."), ("a:4", "empty.")):
        found.add(source, text)
    with pytest.raises(DataError) as caught:
        found.raise_any()
    assert caught.value.problems == ("data.data: a lines 2, 4: empty.", "data.data: a line 7: long.")
