"""Files of what is to be answered, in every form that rows to learn from have."""

import json

import pytest

from lorasmith.data.read.prompts import PLACEHOLDER_ANSWER, read_prompts
from lorasmith.data.rows import formats
from lorasmith.data.rows.conversation import Message
from lorasmith.data.rows.formats import FORMATS, RowFormat, to_conversation
from lorasmith.errors import DataError

ASKED = [{"from": "human", "value": "Hi"}]
ROWS = [
    {"instruction": "Hi"},
    {"prompt": "Hi"},
    {"conversations": ASKED},
    {"conversations": [*ASKED, {"from": "gpt", "value": "unread"}]},
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"conversation": [{"human": "Hi", "assistant": "unread"}]},
    {"prompt": [{"role": "user", "content": "Hi"}]},
]


def test_prompts_of_all_forms(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    (tmp_path / "a.csv").write_text('id,prompt\n1,"Hi"\n', "utf-8")
    found = [
        to_conversation(record).messages for name in ("a.jsonl", "a.csv") for record in read_prompts(tmp_path / name)
    ]
    assert found == [(Message("user", "Hi"), Message("assistant", PLACEHOLDER_ANSWER))] * 8


def test_a_new_row_format_is_asked_by_the_column_of_its_question(tmp_path, monkeypatch):
    """What stands for the answer follows from the format's definition, wherever it comes from."""
    theirs = RowFormat("question/answer", ("question", "answer"), (), lambda _fields: None, FORMATS[-1].conversation)
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, theirs))
    (tmp_path / "a.jsonl").write_text('{"question": "Hi"}\n', "utf-8")
    (record,) = read_prompts(tmp_path / "a.jsonl")
    assert record.fields == {"question": "Hi", "answer": PLACEHOLDER_ANSWER}


def test_a_plain_text_asks_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi"}\n{"text": "Once"}\n', "utf-8")
    with pytest.raises(
        DataError, match=r"a\.jsonl line 2: a 'text' row is not a prompt\. Rename the key to 'prompt'\.$"
    ):
        read_prompts(tmp_path / "a.jsonl")
