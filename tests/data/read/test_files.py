"""Files, saved datasets and folders become records, and what is said of those that cannot."""

import json
import re
import sys

import pytest

from lorasmith.data.read.files import read_file, read_records
from lorasmith.data.rows.conversation import Message
from lorasmith.data.rows.formats import to_conversation
from lorasmith.errors import DataError, MissingExtraError
from tests.support.paths import SHARED
from tests.support.row_files import CHAT, OTHER, ROW, problems

# -- what can be read -----------------------------------------------------------------------------------------------


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


def test_what_was_found_is_said(write):
    rows = [ROW | {"id": 7}, ROW, OTHER, ROW | {"id": 0, "input": ""}]
    path = write("a.jsonl", rows)
    found = read_file(path)
    assert (found.format, len(found.records), [record.fields for record in found.records[:1]]) == ("alpaca", 4, [ROW])
    assert [note.replace(f"{path.parent}/", "") for note in found.notes] == [
        "a.jsonl: alpaca format, 4 rows, none skipped.",
        "a.jsonl: unused keys, with the number of rows that have them: 'id' (2).",
        "Duplicates of earlier rows, which are kept: 2 (a.jsonl lines 2, 4).",
    ]
    chat = CHAT | {"messages": [*CHAT["messages"][:1], CHAT["messages"][1] | {"seen": False}]}
    assert read_file(write("b.jsonl", [chat])).notes[1].endswith(": 'messages.seen' (1).")


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
    assert problems(write("c.txt", chinese.encode("gb18030"))) == [
        "data.data: c.txt line 1 is not valid UTF-8. Save the file as UTF-8."
    ]
    assert problems(write("a.xlsx", "PK"))[0].startswith("data.data: a.xlsx is not in a supported format. ")


def test_all_bad_rows_are_told_at_once_and_the_same_fault_once(write):
    rows = [ROW | {"output": ""}] * 30 + [ROW, {"a": 1}]
    empty, columns = problems(write("a.jsonl", rows))
    assert empty.startswith("data.data: a.jsonl lines 1-30: 'output' is empty")
    assert columns.startswith("data.data: a.jsonl line 32: this row has 'a'")


# -- bad rows that may be left out ------------------------------------------------------------------------------------


def test_few_bad_rows_are_left_out_and_listed_and_more_are_refused(write):
    rows = [ROW | {"input": str(n)} for n in range(18)]
    path = write("a.jsonl", "\n".join([*map(json.dumps, rows[:9]), "{", *map(json.dumps, [*rows[9:], {"a": 1}])]))
    found = read_file(path, skip=0.1)
    assert [record.fields for record in found.records] == rows
    assert found.notes[0] == f"{path}: alpaca format, 18 rows, 2 skipped."
    assert [text.replace(f"{path.parent}/", "")[:40] for text in found.warnings] == [
        "a.jsonl line 10: skipped: not valid JSON",
        "a.jsonl line 20: skipped: this row has '",
    ]
    assert read_file(path, skip=2).records == found.records
    assert problems(path)[-1] == ("data.data: 2 of 20 rows have problems. To leave them out, use --skip-bad-rows 2.")
    with pytest.raises(DataError) as caught:
        read_file(path, skip=1)
    assert len(caught.value.problems) == 3
    assert caught.value.problems[-1] == (
        "data.data: 2 of 20 rows have problems, more than data.skip_bad_rows = 1 allows."
    )


def test_what_cannot_be_read_is_never_left_out(write):
    """The rest of a broken CSV file, rows of no format, and all rows."""
    with pytest.raises(DataError, match="a quote is opened but never closed"):
        read_file(write("a.csv", 'instruction,output\na,b\nc,"d\ne,f\n'), skip=0.9)
    with pytest.raises(DataError, match="this row has 'a'"):
        read_file(write("b.jsonl", [{"a": 1}]), skip=0.9)
    with pytest.raises(DataError, match="'output' is empty"):
        read_file(write("c.jsonl", [{"instruction": "a", "output": ""}]), skip=5)


# -- other files ------------------------------------------------------------------------------------------------------


def test_a_document_is_one_row(write):
    path = write("a.txt", "\ufeffOnce\r\nupon a time.\n")
    (record,) = read_file(path).records
    assert (record.fields, record.source) == ({"text": "Once\nupon a time.\n"}, str(path))


def test_placeholders_are_filled(write):
    row = {"instruction": "Who are you?", "output": "I am {{name}} by {{ author }}, not {{x}}."}
    found = read_file(write("a.jsonl", [row, ROW]), filling={"name": "Ada", "y": "z"})
    assert found.records[0].fields["output"] == "I am Ada by {{ author }}, not {{x}}."
    assert found.filled == {"name"}
    assert found.warnings[0].endswith(
        "a.jsonl line 1: the placeholder {{author}} is trained on as it is. Give the text for it with "
        "--fill author=TEXT."
    )
