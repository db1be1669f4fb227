"""CSV, TSV and Parquet."""

import csv
import gzip
import io
import json
import sys

import pytest

from lorasmith.data.read.files import read_file
from lorasmith.data.rows.formats import to_conversation
from lorasmith.errors import DataError, MissingExtraError

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def rows(tmp_path):
    """`rows(name, content)`: line and fields of each row of a file with this content."""

    def rows(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(int(r.source.rpartition(":")[2]), r.fields) for r in read_file(path).records]

    return rows


@pytest.fixture
def refused(rows, tmp_path):
    """`refused(name, content)`: the problems of such a file, without its folder."""

    def refused(name, content):
        with pytest.raises(DataError) as caught:
            rows(name, content)
        return [text.replace(f"{tmp_path}/", "") for text in caught.value.problems]

    return refused


TABLE = 'id,instruction,output\r\n1,"say ""hi"",\nplease",好\r\n\r\n2,b,"c\n\nd"\r\n3,e,f\r\n'
READ = [
    (2, {"instruction": 'say "hi",\nplease', "output": "好"}),
    (5, {"instruction": "b", "output": "c\n\nd"}),
    (8, {"instruction": "e", "output": "f"}),
]


def test_a_row_of_csv_knows_the_line_where_it_begins(rows):
    assert rows("a.csv", TABLE) == READ
    assert rows("b.csv", BOM + TABLE.replace("id,", ",").encode()) == READ
    assert rows("c.CSV.gz", gzip.compress(TABLE.encode())) == READ
    assert rows("d.tsv", "instruction\toutput\na, b\tc\n") == [(2, {"instruction": "a, b", "output": "c"})]
    assert rows("e.csv", "prompt,completion\na," + "x" * 200_000)[0][1]["completion"] == "x" * 200_000


def test_all_rows_with_too_few_or_too_many_cells_are_told(refused):
    few, many, empty = refused("a.csv", 'instruction,output\na,b\nc\n"d\n",e,f\ng,\n')
    assert few.startswith(
        "data.data: a.csv line 3: expected 2 cells as in the header ('instruction', 'output'), found 1."
    )
    assert many.startswith(
        "data.data: a.csv line 4: expected 2 cells as in the header ('instruction', 'output'), found 3."
    )
    assert empty.startswith("data.data: a.csv line 6: 'output' is empty")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", 'instruction,output\na,b\nc,"d\ne,f\n', "a.csv line 3: not valid CSV: a quote is opened but never"),
        (
            "a.tsv",
            'instruction\toutput\n"a" b\tc\n',
            "a.tsv line 2: not valid CSV: quotes within a quoted cell must be doubled",
        ),
        ("a.csv", "a,a,b\n1,2,3\n", "a.csv: several columns are named 'a'."),
        (
            "a.csv",
            "instruction;output\na;b\n",
            "a.csv: the first line has a single column, 'instruction;output'. If the",
        ),
        ("a.csv", "instruction,output\n", "a.csv contains no rows."),
        ("a.csv", b"instruction,output\na,b\n" + "考,好".encode("gb18030"), "a.csv line 3 is not valid UTF-8."),
        ("a.parquet", b"no parquet", "a.parquet is not a valid Parquet file: "),
    ],
)
def test_tables_that_cannot_be_read(refused, name, content, text):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="the extra lorasmith[data] is not installed")
    (found,) = refused(name, content)
    assert found.startswith(f"data.data: {text}")


TALK = [{"role": "user", "content": 'say "hi",\nplease'}, {"role": "assistant", "content": "好", "learn": True}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_lists_in_cells_are_json(rows, refused, name, separator):
    def table(*lines):
        text = io.StringIO()
        csv.writer(text, delimiter=separator).writerows(lines)
        return text.getvalue()

    talk, tools = json.dumps(TALK, indent=1), json.dumps(TOOLS)
    found = rows(name, table(["messages", "tools"], [talk, tools], [json.dumps(TALK), ""]))
    assert found == [(2, {"messages": TALK, "tools": TOOLS}), (13, {"messages": TALK, "tools": ""})]
    found = rows(name, table(["conversations", "system"], [json.dumps(SHAREGPT), "[1]"]))
    assert found == [(2, {"conversations": SHAREGPT, "system": "[1]"})]
    found = rows(name, table(["instruction", "output", "history"], ["a", "b", '[["c", "d"]]'], ["a", "b", ""]))
    assert [fields["history"] for _line, fields in found] == [[["c", "d"]], ""]
    half = json.dumps(SHAREGPT[:1])
    bad = [[talk, ""], [str(TALK), ""], ["", ""], ["Hi", ""], [talk[:-9], ""], [half, ""], [talk, "[1]"]]
    found = refused(name, table(["messages", "tools"], *bad))
    found = [text.removeprefix(f"data.data: {name} line ") for text in found]
    assert [text[: len(end)] for text, end in zip(found, BAD_LISTS, strict=True)] == BAD_LISTS


BAD_LISTS = [
    "13: 'messages' contains a Python literal, not JSON. Write it with json.dumps.",
    "14: 'messages' is empty, so there is nothing to train on. Add ",
    "15: 'messages' must be a list of messages, found text.",
    "16: 'messages' is not valid JSON (line 9, column 12 of its text): ",
    "25: no message has the role 'gpt', so there is nothing to train on.",
    "26: 'tools' must be a list of function schemas, found a list.",
]


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra lorasmith[data] is not installed")
    from pyarrow import parquet

    talk = [{"role": "user", "content": "Hi", "learn": None}, {"role": "assistant", "content": "Hello", "learn": True}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk, "text": None}] * 3), path)
    found = read_file(path)
    assert (found.format, [(r.fields, r.source) for r in found.records][2]) == (
        "chat",
        ({"messages": [{"role": "user", "content": "Hi"}, talk[1]]}, f"{path} row 3"),
    )
    texts = [{"messages": json.dumps(TALK), "tools": None}, {"messages": json.dumps(TALK), "tools": json.dumps(TOOLS)}]
    parquet.write_table(pyarrow.Table.from_pylist(texts), path)
    assert [r.fields for r in read_file(path).records][1] == {"messages": TALK, "tools": TOOLS}
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        MissingExtraError, match=r"a\.parquet requires the package pyarrow\. .*pip install 'lorasmith\[data\]'"
    ):
        read_file(path)


def test_lines_that_end_as_on_an_old_mac(rows):
    assert rows("a.csv", 'instruction,output\ra,b\r"c\rd",e\r') == [
        (2, {"instruction": "a", "output": "b"}),
        (3, {"instruction": "c\rd", "output": "e"}),
    ]


def test_nulls_that_arrow_adds_are_not_there(tmp_path):
    """All objects of a column have the same keys, so other calls' arguments and other parts' keys are null."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra lorasmith[data] is not installed")
    from pyarrow import parquet

    def call(**arguments):
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }

    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, call(**one)]} for one in ({"item": "E27"}, {"city": "Köln"})
    ]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    first, second = read_file(tmp_path / "a.parquet").records
    assert first.fields["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"item": "E27"}}}]
    assert to_conversation(second).messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"city": "Köln"}}


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra lorasmith[data] is not installed")
    table, path = pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b", "n": None}] * 3), tmp_path / "a.arrow"
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, 2)
    assert [(one.fields, one.source) for one in read_file(path).records][2] == (
        {"prompt": "a", "completion": "b"},
        f"{path} row 3",
    )
    path.write_bytes(b"no arrow")
    with pytest.raises(DataError, match=r"a\.arrow is not a valid Arrow file: "):
        read_file(path)
