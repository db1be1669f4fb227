import gzip
import json
import re
import sys

import pytest

from lorasmith.data.read.files import read_file, read_records
from lorasmith.data.rows.conversation import MAX_LISTED, Message, Problems, places
from lorasmith.data.rows.formats import to_conversation
from lorasmith.errors import DataError, MissingExtraError
from lorasmith.report import Report
from tests.support.paths import SHARED

ROW = {"instruction": "Ask", "input": "", "output": "Answer"}
OTHER = {"instruction": "Why?", "output": "Because"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def write(tmp_path):
    """`write(name, content)`: a file in an empty folder; rows become JSONL."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def problems(path) -> list[str]:
    """What reading it raises, each with the path shortened to its name."""
    with pytest.raises(DataError) as caught:
        read_records(path)
    return [text.replace(f"{path.parent}/", "") for text in caught.value.problems]


# -- what can be read -----------------------------------------------------------------------------------------------


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


def test_the_name_of_a_file_does_not_decide_its_form(write):
    assert len(read_records(write("lines.json", [ROW, ROW]))) == 2
    assert len(read_records(write("list.jsonl", json.dumps([ROW, ROW])))) == 2


@pytest.mark.parametrize("blanks", ["", " "])
def test_an_alpaca_row_is_a_question_and_its_answer(write, blanks):
    rows = [
        {"instruction": f"{blanks}Ask\n", "input": "this ", "output": " Answer "},
        {"instruction": "Ask", "output": "Answer"},
        {"instruction": "Ask", "input": None, "output": "Answer"},
    ]
    found = [to_conversation(record).messages for record in read_records(write("a.jsonl", rows))]
    assert found == [
        (Message("user", user), Message("assistant", answer))
        for user, answer in [("Ask\n\nthis", " Answer "), ("Ask", "Answer"), ("Ask", "Answer")]
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.GZ"])
def test_packed_files(write, name):
    content = (
        json.dumps([ROW, OTHER] * 9).encode()
        if ".json." in name
        else "\n".join(map(json.dumps, [ROW, OTHER] * 9)).encode()
    )
    path = write(name, packed(name, content))
    assert [record.fields for record in read_records(path)] == [ROW, OTHER] * 9
    path = write(f"cut-{name}", packed(name, content)[:-6])
    assert problems(path)[0].startswith(f"data.data: cut-{name}: cannot be read: ")
    assert problems(write(f"bad-{name}", b"no packed file"))[0].startswith(f"data.data: bad-{name}: cannot be read: ")


def packed(name: str, content: bytes) -> bytes:
    if name.lower().endswith(".gz"):
        return gzip.compress(content)
    pyarrow = pytest.importorskip("pyarrow", reason="the extra lorasmith[data] is not installed")
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def test_what_was_found_is_said(write):
    rows = [ROW | {"id": 7}, ROW, OTHER, ROW | {"id": 0, "input": ""}]
    path = write("a.jsonl", rows)
    found = read_file(path)
    assert (found.format, len(found.records), [record.fields for record in found.records[:1]]) == ("alpaca", 4, [ROW])
    assert [note.replace(f"{path.parent}/", "") for note in found.notes] == [
        "a.jsonl: alpaca format, 4 rows, none skipped.",
        "a.jsonl: unused keys, with the number of rows that have them: 'id' (1).",
        "Duplicates of earlier rows, which are kept: 2 (a.jsonl lines 2, 4).",
    ]
    chat = CHAT | {"messages": [*CHAT["messages"][:1], CHAT["messages"][1] | {"thinking": "Well"}]}
    assert read_file(write("b.jsonl", [chat])).notes[1].endswith(": 'messages.thinking' (1).")


def test_a_large_file_shows_its_progress(write, monkeypatch):
    monkeypatch.setattr("lorasmith.data.read.stream.LARGE", 1)
    path, steps = write("a.jsonl", [ROW]), []
    report = Report()
    report.progress = lambda task, done, total: steps.append((task, done, total))
    read_file(path, report=report)
    assert steps[-1] == ("reading a.jsonl", path.stat().st_size, path.stat().st_size)


def test_real_rows():
    """Rows that nobody here wrote."""
    file = SHARED / "data" / "alpaca_zh_demo.json"
    if not file.is_file():
        pytest.skip("no shared/data beside this checkout")
    found = read_file(file)
    assert (found.format, len(found.records)) == ("alpaca", 1000)
    assert found.notes[0] == f"{file}: alpaca format, 1,000 rows, none skipped."
    twice = 1000 - len({tuple(row.values()) for row in json.loads(file.read_bytes())})
    assert found.notes[1].startswith(f"Duplicates of earlier rows, which are kept: {twice} (")
    assert all(len(to_conversation(record).messages) == 2 for record in found.records)


def test_a_folder_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra lorasmith[data] is not installed")
    rows = datasets.Dataset.from_list([CHAT, CHAT])
    rows.save_to_disk(tmp_path / "one")
    assert [(r.fields, r.source) for r in read_records(tmp_path / "one")] == [
        (CHAT, f"{tmp_path}/one row 1"),
        (CHAT, f"{tmp_path}/one row 2"),
    ]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    assert problems(tmp_path / "both") == [
        "data.data: both contains several splits. Give one of them: both/train, both/test."
    ]
    assert len(read_records(tmp_path / "both" / "train")) == 2
    datasets.Dataset.from_list([ROW, ROW | {"output": ""}]).save_to_disk(tmp_path / "bad")
    assert problems(tmp_path / "bad")[0].startswith("data.data: bad row 2: 'output' is empty")


def test_a_folder_of_datasets_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'lorasmith[data]'")):
        read_records(tmp_path)


# -- what cannot ----------------------------------------------------------------------------------------------------


def test_a_missing_file_names_a_similar_one(write):
    path = write("train.jsonl", [ROW])
    assert problems(path.with_name("trian.jsonl")) == [
        "data.data: trian.jsonl does not exist. Did you mean train.jsonl?"
    ]
    assert problems(path.with_name("train.json"))[0].endswith("Did you mean train.jsonl?")
    assert problems(path.with_name("zzz")) == ["data.data: zzz does not exist."]
    with pytest.raises(DataError, match=r"The folder .*nowhere does not exist either\."):
        read_records(path.parent / "nowhere" / "train.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(write, content):
    assert problems(write("a.jsonl", content)) == ["data.data: a.jsonl is empty. Give a file with at least one row."]


def test_an_empty_list(write):
    assert problems(write("a.json", "[ ]")) == [
        "data.data: a.json contains no rows. Give a file with at least one row."
    ]


def test_a_folder_that_is_no_data_set(write):
    folder = write("b.jsonl", [ROW]).parent
    assert problems(folder)[0].endswith(
        "is a folder, but not one saved by `datasets`. Give one of the files in it: b.jsonl."
    )


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


def test_one_object_over_many_lines_is_no_list(write):
    assert problems(write("a.json", json.dumps({"data": [ROW], "v": 1}, indent=2))) == [
        "data.data: a.json is a single JSON object ('data', 'v'), not a list of rows. Write the rows as "
        "a list in [ ], or one row per line."
    ]


def test_files_that_are_not_utf8_json(write):
    chinese = '{"instruction": "考试", "output": "好"}\n'
    assert problems(write("a.jsonl", json.dumps(ROW).encode() + b"\n" + chinese.encode("gb18030"))) == [
        "data.data: a.jsonl line 2: byte 18 of this line is not valid UTF-8. Save the file as UTF-8."
    ]
    assert problems(write("a.json", b"[\n" + chinese.encode("gb18030") + b"]")) == [
        "data.data: a.json line 2 is not valid UTF-8. Save the file as UTF-8."
    ]
    assert problems(write("b.jsonl", chinese.encode("utf-16"))) == [
        "data.data: b.jsonl is encoded in UTF-16. Save it as UTF-8."
    ]
    assert problems(write("a.xlsx", "PK"))[0].startswith("data.data: a.xlsx is not in a supported format. ")


def test_all_bad_rows_are_told_at_once_and_the_same_fault_once(write):
    rows = [ROW | {"output": ""}] * 30 + [ROW, {"a": 1}]
    empty, columns = problems(write("a.jsonl", rows))
    assert empty.startswith("data.data: a.jsonl lines 1-30: 'output' is empty")
    assert columns.startswith("data.data: a.jsonl line 32: this row has 'a'")


def test_many_different_faults_are_counted_after_the_twentieth(write):
    texts = problems(write("a.jsonl", [{f"key{n}": 1} for n in range(MAX_LISTED + 7)]))
    assert len(texts) == MAX_LISTED + 1
    assert texts[-1] == "data.data: 7 more rows have problems."


def test_places_of_several_files():
    assert places(["a:b.json:3", "d row 4", "a:b.json:7", "x"]) == "a:b.json lines 3, 7; d row 4; x"
    assert places([f"a:{n}" for n in (9, 1, 2, 3, 5, 6)], most=1) == "a lines 1-3 and 3 more"  # rows, not runs
    Problems("data.data").raise_any()  # nothing found, nothing raised


def test_a_line_that_ends_too_early_is_named_at_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction":"c","output":\n', "utf-8")
    with pytest.raises(DataError, match=r"line 2: not valid JSON at column 29"):
        list(read_records(str(path)))
