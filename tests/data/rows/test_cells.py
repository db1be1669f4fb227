"""Lists in cells are parsed, and text that only looks like a list is reported."""

import json

import pytest

from lorasmith.data.rows.cells import LIST_COLUMNS, drop_nulls, json_problem, parse_list_cells


@pytest.mark.parametrize("key", LIST_COLUMNS)
def test_json_in_a_column_of_lists_is_parsed(key):
    value = [{"role": "user", "content": "Hi"}]
    row = {key: json.dumps(value), "output": "[1]"}
    assert parse_list_cells(row) == {key: value, "output": "[1]"}
    assert row[key] == json.dumps(value), "the row itself is not changed"


@pytest.mark.parametrize("text", ["", "Hi", "[", "3", "null", "true", '"[]"', "[" * 10**5])
def test_other_text_stays(text):
    assert parse_list_cells({"messages": text}) == {"messages": text}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Hi", None),
        (' [{"a": 1}]', None),
        ("[{'role': 'user'}]", "'history' contains a Python literal, not JSON. Write it with json.dumps."),
        ("[1,\n 2", "'history' is not valid JSON (line 2, column 3 of its text): Expecting ',' delimiter."),
        ("[" * 10**5, "'history' is text that is not valid JSON: nested too deeply."),
    ],
)
def test_text_that_looks_like_a_list_and_is_none(text, problem):
    assert json_problem("history", text) == problem


def test_nulls_are_dropped_inside_values_only():
    row = {"a": None, "b": {"c": None, "d": [{"e": None, "f": 0}, None]}, "g": ""}
    assert drop_nulls(row) == {"a": None, "b": {"d": [{"f": 0}, None]}, "g": ""}
