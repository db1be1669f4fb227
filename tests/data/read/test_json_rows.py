"""Rows of JSON Lines and of a JSON list know their lines, and syntax errors are reported with them."""

import json

import pytest

from lorasmith.data.read.files import read_file, read_records
from lorasmith.errors import DataError
from lorasmith.report import Report
from tests.support.row_files import OTHER, ROW, problems


def test_jsonl_knows_its_lines(write):
    path = write("a.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\n  \n" + json.dumps(OTHER).encode())
    first, second = read_records(path)
    assert (first.fields, first.source) == (ROW, f"{path}:1")
    assert (second.fields, second.source) == (OTHER, f"{path}:4")


def test_only_a_line_feed_ends_a_row(write):
    row = ROW | {"output": "one\u2028two\u0085three"}
    assert [record.fields for record in read_records(write("a.jsonl", [row, ROW]))] == [row, ROW]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_json_list_knows_the_line_where_each_row_begins(write, bom):
    text = bom + "\n[\n" + json.dumps(ROW, indent=1) + ",\n\n" + json.dumps(ROW) + ", " + json.dumps(OTHER) + "\n]\n"
    path = write("a.json", text)
    assert [(record.fields, record.source) for record in read_records(path)] == [
        (ROW, f"{path}:3"),
        (ROW, f"{path}:9"),
        (OTHER, f"{path}:9"),
    ]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[\n {"instruction": "a",\n  "output" "b"}\n]', "line 3, column 12: not valid JSON: Expecting ':' delimiter."),
        (f"[{json.dumps(ROW)}\n {json.dumps(ROW)}]", "line 2, column 2: not valid JSON: a comma or the closing ]"),
        (f"[{json.dumps(ROW)},\n]", "line 2, column 1: not valid JSON: "),
        (f"[{json.dumps(ROW)},\n", "line 2, column 1: not valid JSON: the file ends in the middle of the list"),
        ('[{"instruction": "a', "line 1, column 18: not valid JSON: "),
        (f"[{json.dumps(ROW)}]\n[", "line 2, column 1: not valid JSON: there is more text after"),
    ],
    ids=["colon", "comma", "trailing comma", "end", "in a text", "second list"],
)
def test_broken_json_in_a_list(write, content, where):
    (text,) = problems(write("a.json", content))
    assert text.startswith(f"data.data: a.json {where}")


def test_every_broken_line_of_jsonl_is_told(write):
    lines = [json.dumps(ROW), '{"instruction": }', "[1]", "3", '"text"', json.dumps(ROW)[:-3]]
    assert problems(write("a.jsonl", "\n".join(lines))) == [
        "data.data: a.jsonl line 2: not valid JSON at column 17: Expecting value.",
        'data.data: a.jsonl line 3: a row must be an object like {"instruction": ..., "output": ...}, found [1].',
        'data.data: a.jsonl line 4: a row must be an object like {"instruction": ..., "output": ...}, found 3.',
        'data.data: a.jsonl line 5: a row must be an object like {"instruction": ..., "output": ...}, found "text".',
        "data.data: a.jsonl line 6: not valid JSON at column 47: Unterminated string starting at.",
    ]


def test_a_line_that_ends_too_early_is_named_at_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction":"c","output":\n', "utf-8")
    with pytest.raises(DataError, match=r"line 2: not valid JSON at column 29"):
        list(read_records(str(path)))


def test_one_object_over_many_lines_is_no_list(write):
    assert problems(write("a.json", json.dumps({"data": [ROW], "v": 1}, indent=2))) == [
        "data.data: a.json is a single JSON object ('data', 'v'), not a list of rows. Write the rows as "
        "a list in [ ], or one row per line."
    ]


def test_a_long_list_reports_its_progress(write, monkeypatch):
    monkeypatch.setattr("lorasmith.data.read.json_rows.ITEMS", 2)
    text, steps, report = json.dumps([ROW] * 5), [], Report()
    report.progress = lambda task, done, total: steps.append((task, done, total))
    read_file(write("a.json", text), report=report)
    length = len(json.dumps(ROW))
    assert steps == [("reading a.json", at, len(text)) for at in (2 * length + 3, 4 * length + 7)]


def test_python_is_not_json(write):
    lines = [json.dumps(ROW), str(ROW)]
    text = "not JSON but Python, with 'single quotes'. Write it with json.dumps."
    assert problems(write("a.jsonl", "\n".join(lines))) == [f"data.data: a.jsonl line 2: {text}"]
    assert problems(write("a.json", str([ROW, ROW]))) == [f"data.data: a.json: {text}"]


@pytest.mark.parametrize("columns", [{"q": ["a", "b"], "a": ["c", "d"]}, {"q": {"0": "a", "1": "b"}}])
@pytest.mark.parametrize("indent", [None, 1])
def test_columns_are_not_rows(write, columns, indent):
    keys = "'q', 'a'" if len(columns) > 1 else "'q'"
    assert problems(write("a.json", json.dumps(columns, indent=indent))) == [
        f"data.data: a.json holds the columns {keys}, each with 2 values, instead of rows. Write one object per row; "
        "with pandas: to_json(FILE, orient='records', lines=True)."
    ]


def test_a_single_row_of_token_ids_is_no_table(write):
    (text,) = problems(write("a.jsonl", [{"input_ids": [1, 2], "labels": [-100, 2]}]))
    assert text.startswith("data.data: a.jsonl line 1: this row holds token ids ('input_ids')")


def test_lines_that_end_as_on_an_old_mac(write):
    path = write("a.jsonl", "\r".join(map(json.dumps, [ROW, OTHER])))
    assert [(record.fields, record.source) for record in read_records(path)] == [
        (ROW, f"{path}:1"),
        (OTHER, f"{path}:2"),
    ]


@pytest.mark.parametrize(
    ("value", "why"),
    [("9" * 5000, "a number with more than 4300 digits"), ("[" * 3000 + "]" * 3000, "nested too deeply")],
)
def test_numbers_and_brackets_beyond_the_parsers_limits(write, value, why):
    line = json.dumps(ROW)[:-1] + f', "x": {value}}}'
    assert why in problems(write("a.jsonl", f"{json.dumps(ROW)}\n{line}"))[0]
    assert problems(write("a.json", f"[{json.dumps(ROW)},\n{line}]"))[0].startswith("data.data: a.json line 2")
    cell = json.dumps(value)
    row = f'{{"messages": {cell}}}'
    assert "data.data: b.jsonl line 1: 'messages' " in problems(write("b.jsonl", row))[0]
