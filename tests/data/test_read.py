import json
import re
import sys

import pytest

from lorasmith.data.conversation import LISTED, Message, Problems, conversation, places
from lorasmith.data.read import read
from lorasmith.errors import DataError, MissingExtraError

ROW = {"instruction": "Ask", "input": "", "output": "Answer"}
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
        read(path)
    return [text.replace(f"{path.parent}/", "") for text in caught.value.problems]


# -- what can be read -----------------------------------------------------------------------------------------------


def test_jsonl_knows_its_lines(write):
    path = write("a.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\n  \n" + json.dumps(CHAT).encode())
    first, second = read(path)
    assert (first.fields, first.source) == (ROW, f"{path}:1")
    assert (second.fields, second.source) == (CHAT, f"{path}:4")


def test_only_a_line_feed_ends_a_row(write):
    row = ROW | {"output": "one\u2028two\u0085three"}
    assert [record.fields for record in read(write("a.jsonl", [row, ROW]))] == [row, ROW]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_json_list_knows_the_line_where_each_row_begins(write, bom):
    text = bom + "\n[\n" + json.dumps(ROW, indent=1) + ",\n\n" + json.dumps(ROW) + ", " + json.dumps(CHAT) + "\n]\n"
    path = write("a.json", text)
    assert [(record.fields, record.source) for record in read(path)] == [
        (ROW, f"{path}:3"),
        (ROW, f"{path}:9"),
        (CHAT, f"{path}:9"),
    ]


def test_the_name_of_a_file_does_not_decide_its_form(write):
    assert len(read(write("lines.json", [ROW, ROW]))) == 2
    assert len(read(write("list.jsonl", json.dumps([ROW, ROW])))) == 2


def test_both_forms_become_the_same_conversation(write):
    rows = [
        {"instruction": " Ask\n", "input": "this ", "output": " Answer "},
        {"instruction": "Ask", "output": "Answer"},
        {"instruction": "Ask", "input": None, "output": "Answer"},
        {"messages": [{"role": "user", "content": " Ask "}, {"role": "assistant", "content": "Answer"}]},
    ]
    found = [conversation(record).messages for record in read(write("a.jsonl", rows))]
    assert found == [
        (Message("user", user), Message("assistant", answer))
        for user, answer in [("Ask\n\nthis", " Answer "), ("Ask", "Answer"), ("Ask", "Answer"), (" Ask ", "Answer")]
    ]


def test_a_folder_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra lorasmith[data] is not installed")
    rows = datasets.Dataset.from_list([CHAT, CHAT])
    rows.save_to_disk(tmp_path / "one")
    assert [(r.fields, r.source) for r in read(tmp_path / "one")] == [
        (CHAT, f"{tmp_path}/one row 1"),
        (CHAT, f"{tmp_path}/one row 2"),
    ]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    assert problems(tmp_path / "both") == ["data.data: both holds several data sets. Name one: both/train, both/test."]
    assert len(read(tmp_path / "both" / "train")) == 2
    datasets.Dataset.from_list([ROW, ROW | {"output": ""}]).save_to_disk(tmp_path / "bad")
    assert problems(tmp_path / "bad")[0].startswith("data.data: bad row 2: 'output' is empty")


def test_a_folder_of_datasets_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'lorasmith[data]'")):
        read(tmp_path)


# -- what cannot ----------------------------------------------------------------------------------------------------


def test_a_missing_file_names_a_similar_one(write):
    path = write("train.jsonl", [ROW])
    assert problems(path.with_name("trian.jsonl")) == [
        "data.data: trian.jsonl: no such file or folder. Did you mean train.jsonl?"
    ]
    assert problems(path.with_name("train.json"))[0].endswith("Did you mean train.jsonl?")
    assert problems(path.with_name("zzz")) == ["data.data: zzz: no such file or folder."]
    with pytest.raises(DataError, match=r"There is no folder .*nowhere either\."):
        read(path.parent / "nowhere" / "train.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(write, content):
    assert problems(write("a.jsonl", content)) == ["data.data: a.jsonl is empty. Name a file with at least one row."]


def test_an_empty_list(write):
    assert problems(write("a.json", "[ ]")) == ["data.data: a.json holds no rows. Name a file with at least one."]


def test_a_folder_that_is_no_data_set(write):
    folder = write("b.jsonl", [ROW]).parent
    assert problems(folder)[0].endswith("is a folder that `datasets` did not save. Name a file in it: b.jsonl.")


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[\n {"instruction": "a",\n  "output" "b"}\n]', "line 3, column 12: not valid JSON: Expecting ':' delimiter."),
        (f"[{json.dumps(ROW)}\n {json.dumps(ROW)}]", "line 2, column 2: not valid JSON: a comma or the closing ]"),
        (f"[{json.dumps(ROW)},\n]", "line 2, column 1: not valid JSON: "),
        (f"[{json.dumps(ROW)},\n", "line 2, column 1: not valid JSON: the file ends in the middle of the list"),
        ('[{"instruction": "a', "line 1, column 18: not valid JSON: "),
        (f"[{json.dumps(ROW)}]\n[", "line 2, column 1: not valid JSON: something follows"),
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
        "data.data: a.json is one object ('data', 'v'), not rows. Write a list of rows in [ ], or one row on each line."
    ]


def test_files_that_are_not_utf8_json(write):
    chinese = '{"instruction": "考试", "output": "好"}\n'
    assert problems(write("a.jsonl", json.dumps(ROW).encode() + b"\n" + chinese.encode("gb18030"))) == [
        "data.data: a.jsonl line 2: byte 18 of the line is not UTF-8. Save the file as UTF-8."
    ]
    assert problems(write("a.json", b"[\n" + chinese.encode("gb18030") + b"]")) == [
        "data.data: a.json line 2 is not UTF-8. Save the file as UTF-8."
    ]
    assert problems(write("b.jsonl", chinese.encode("utf-16"))) == ["data.data: b.jsonl is UTF-16. Save it as UTF-8."]
    assert problems(write("a.csv", "instruction,output\na,b\n"))[0].startswith("data.data: a.csv is no JSON. ")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a", "response": "b"}, "the row has 'prompt', 'response'; known are rows with 'instruction', "
         "'output' and, if there is one, 'input', or rows with 'messages'. Should 'prompt' be 'instruction'? "
         "Should 'response' be 'output'?"),
        ({"instruction": "a", "ouput": "b"}, "Should 'ouput' be 'output'?"),
        ({"conversations": []}, "Should 'conversations' be 'messages'?"),
        ({"a": 1}, "or rows with 'messages'."),
        ({}, "the row has no keys; known are"),
        (ROW | {"output": 3}, "'output' must be text, found a number."),
        (ROW | {"instruction": None}, "'instruction' must be text, found null."),
        (ROW | {"input": ["a"]}, "'input' must be text, found a list."),
        (ROW | {"output": " \n"}, "'output' is empty, so there is nothing to learn from it. Drop the row or "
         "add an answer."),
        (ROW | {"output": "\ud83d"}, "'output' holds half a character"),
        ({"messages": "Hi"}, "'messages' must be a list of messages, found text."),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["Hi"]}, "message 1 must be an object with 'role' and 'content', found text."),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "message 1 has no 'role', only 'from', 'value'. "
         'A message is {"role": ..., "content": ...}.'),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "message 1 has the role 'bot'; known are 'system', 'user', "
         "'assistant'."),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1 has the role ['user']; known are"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 (user): 'content' must be text, "
         "found a list."),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "message 1 (user): 'content' holds half a character"),
        ({"messages": CHAT["messages"][:1]}, "no message has role 'assistant', so there is nothing to learn from it. "
         "Drop the row or add an answer."),
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": ""}]}, "message 3 (assistant) is empty"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_with_its_line(write, row, text):
    path = write("a.jsonl", json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    (found,) = problems(path)
    assert found.startswith("data.data: a.jsonl line 2: ")
    assert text in found


def test_all_bad_rows_are_told_at_once_and_the_same_fault_once(write):
    rows = [ROW | {"output": ""}] * 30 + [ROW, {"a": 1}]
    empty, columns = problems(write("a.jsonl", rows))
    lines = ", ".join(str(n) for n in range(1, LISTED + 1))
    assert empty.startswith(f"data.data: a.jsonl lines {lines} and 10 more: 'output' is empty")
    assert columns.startswith("data.data: a.jsonl line 32: the row has 'a'")


def test_many_different_faults_are_counted_after_the_twentieth(write):
    texts = problems(write("a.jsonl", [{f"key{n}": 1} for n in range(LISTED + 7)]))
    assert len(texts) == LISTED + 1
    assert texts[-1] == "data.data: and 7 more rows with problems."


def test_places_of_several_files():
    assert places(["a:b.json:3", "d row 4", "a:b.json:7", "x"]) == "a:b.json lines 3, 7; d row 4; x"
    Problems("data.data").raise_any()  # nothing found, nothing raised


def test_a_line_that_ends_too_early_is_named_at_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction":"c","output":\n', "utf-8")
    with pytest.raises(DataError, match=r"line 2: not valid JSON at column 29"):
        list(read(str(path)))
