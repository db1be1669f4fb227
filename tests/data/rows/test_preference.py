"""Preference rows: the forms of TRL and LLaMA-Factory, and what is wrong with others."""

from typing import Any

import pytest

from lorasmith.data.read.files import read_file
from lorasmith.data.rows.conversation import Record, RowError
from lorasmith.data.rows.preference import PAIRS, RATED, answers_of, preference_format, preference_problem
from lorasmith.errors import DataError
from tests.support.preferences import write_rows


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def share(role: str, content: str) -> dict[str, str]:
    return {"from": role, "value": content}


ASKED = [message("user", "Hi")]
GOOD, BAD = [message("assistant", "Hello")], [message("assistant", "Go")]
HUMAN = "\n\nHuman: Hi\n\nAssistant:"  # as in HH-RLHF
FORMS: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
    {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    {"prompt": "Hi", "chosen": GOOD, "rejected": BAD},
    {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    {"prompt": "Hi", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go"},
    {"conversations": [share("human", "Hi")], "chosen": share("gpt", "Hello"), "rejected": share("gpt", "Go")},
    {"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
    {"messages": ASKED + GOOD, "rejected_response": "Go"},
    {"messages": ASKED + GOOD, "rejected_response": BAD},
    {"messages": ASKED + GOOD, "rejected_messages": ASKED + BAD},
    {"messages": [share("human", "Hi"), share("gpt", "Hello")], "rejected_response": "Go"},
    {"chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} Go"},
    {"prompt": HUMAN, "chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} Go"},
    {"prompt": HUMAN, "chosen": " Hello", "rejected": " Go"},
]
LABELLED: list[dict[str, Any]] = [
    {"prompt": "Hi", "completion": "Hello", "label": True},
    {"prompt": ASKED, "completion": GOOD, "label": 1},
    {"instruction": "Hi", "output": "Hello", "kto_tag": "true"},
    {"conversations": [share("human", "Hi"), share("gpt", "Hello")], "kto_tag": True},
    {"messages": ASKED + GOOD, "label": True},
]


def texts(row: dict[str, Any]) -> list[tuple[bool | None, list[tuple[str, str, bool]]]]:
    return [
        (one.desirable, [(m.role, m.content, m.learn) for m in one.messages if m.role != "user"])
        for one in answers_of(Record(row, "a:1"))
    ]


@pytest.mark.parametrize("row", FORMS)
def test_a_pair_is_two_conversations_the_chosen_one_first(row):
    assert preference_format([row]) is PAIRS
    assert preference_problem(row, PAIRS, "dpo") is None
    assert texts(row) == [(True, [("assistant", "Hello", True)]), (False, [("assistant", "Go", True)])]
    assert {one.messages[0].content for one in answers_of(Record(row, "a:1"))} == {"Hi"}


@pytest.mark.parametrize("row", LABELLED)
def test_a_rated_answer_is_one_conversation(row):
    assert preference_format([row]) is RATED
    assert preference_problem(row, RATED, "kto") is None
    assert texts(row) == [(True, [("assistant", "Hello", True)])]
    label = "label" if "label" in row else "kto_tag"
    for bad in (False, 0, 0.0, "False"):
        assert texts(row | {label: bad})[0][0] is False


def test_earlier_answers_are_not_trained_on():
    before = [message("user", "a"), message("assistant", "b"), *ASKED]
    wanted = [("assistant", "b", False), ("assistant", "Hello", True)]
    rows = [
        {"prompt": before, "chosen": GOOD, "rejected": BAD},
        {"chosen": before + GOOD, "rejected": before + BAD},
        {"messages": before + GOOD, "rejected_response": "Go"},
        {"instruction": "Hi", "history": [["a", "b"]], "chosen": "Hello", "rejected": "Go"},
        {"messages": before + GOOD, "label": True},
    ]
    for row in rows:
        assert texts(row)[0][1] == wanted


def test_an_answer_of_several_turns_is_trained_on_as_a_whole():
    more = [message("user", "And?"), message("assistant", "Bye")]
    row = {"prompt": ASKED, "chosen": GOOD + more, "rejected": BAD}
    assert texts(row)[0][1] == [("assistant", "Hello", True), ("assistant", "Bye", True)]
    rated = {"prompt": ASKED, "completion": GOOD + more, "label": True}
    assert texts(rated)[0][1] == [("assistant", "Hello", True), ("assistant", "Bye", True)]


def test_system_and_tools_belong_to_both():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    row = FORMS[0] | {"system": "Be kind.", "tools": [tool]}
    for one in answers_of(Record(row, "a:1")):
        assert one.messages[0] == ("system", "Be kind.", *one.messages[0][2:])
        assert len(one.tools) == 1


PROBLEMS = [
    (FORMS[0] | {"chosen": ""}, "'chosen' is empty, so there is nothing to compare"),
    (FORMS[0] | {"rejected": []}, "'rejected' is empty"),
    (FORMS[0] | {"rejected": "Hello"}, "'chosen' and 'rejected' are equal"),
    (FORMS[0] | {"chosen": 3}, "'chosen' must be text, a message or a list of messages, found a number"),
    (FORMS[0] | {"system": 3}, "'system' must be text, found a number"),
    (FORMS[0] | {"prompt": 3}, "'prompt' must be text, found a number"),
    ({"chosen": "a", "rejected": "b"}, "are answers without a question"),
    ({"chosen": ASKED + GOOD, "rejected": [message("user", "Ho"), *BAD]}, "do not begin with the same messages"),
    ({"chosen": f"{HUMAN} a", "rejected": f"{HUMAN.replace('Hi', 'Ho')} b"}, "do not begin with the same messages"),
    ({"chosen": f"{HUMAN} a", "rejected": HUMAN}, "'rejected' does not begin with an answer"),
    ({"chosen": f"{HUMAN} a", "rejected": "b"}, "are answers without a question"),
    ({"chosen": ASKED + ASKED, "rejected": ASKED + BAD}, "'chosen' does not begin with an answer"),
    ({"prompt": ASKED, "chosen": GOOD, "rejected": [message("assistant", "")]}, "the message is empty"),
    ({"prompt": [message("usr", "Hi")], "chosen": GOOD, "rejected": BAD}, "unknown role 'usr'"),
    (FORMS[5] | {"history": [["a"]]}, "'history': item 1 must be a pair"),
    ({"instruction": "a", "output": "b"}, "this row has one answer ('instruction', 'output')"),
    (LABELLED[0], "Only --method kto trains on such rows"),
    ({"q": "a", "good_answer": "b", "bad_answer": "c"}, "--map chosen=good_answer rejected=bad_answer"),
    ({"messages": ASKED + GOOD, "rejected_response": "Hello"}, "'chosen' and 'rejected' are equal"),
    ({"messages": ASKED, "rejected_response": "Go"}, "'chosen' does not begin with an answer"),
    ({"messages": ASKED + GOOD, "rejected_response": 3}, "'rejected' must be text, a message or a list of messages"),
    ({"messages": ASKED + GOOD, "rejected_messages": BAD}, "do not begin with the same messages"),
    ({"x": 1}, "this row has 'x'; dpo needs rows such as"),
    (FORMS[0] | {"images": ["a.png"]}, "found 'images', but only text"),
]


@pytest.mark.parametrize(("row", "text"), PROBLEMS)
def test_a_row_that_is_no_pair_says_why(tmp_path, row, text):
    assert text in preference_problem(row, PAIRS, "dpo")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: ") as error:
        read_file(write_rows(tmp_path / "rows.jsonl", [row]), method="dpo")
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (LABELLED[0] | {"label": 3}, "'label' must be true or false, found 3"),
        (LABELLED[0] | {"completion": ""}, "'completion' is empty"),
        ({"text": "a", "label": True}, "a 'text' row has no answer to mark"),
        ({"prompt": "a", "completion": "b"}, "this row has one answer"),
        (FORMS[0], "this row is in preference format"),
    ],
)
def test_a_row_that_is_not_rated_says_why(tmp_path, row, text):
    assert text in preference_problem(row, RATED, "kto")
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: ") as error:
        read_file(write_rows(tmp_path / "rows.jsonl", [LABELLED[0], row, LABELLED[2]]), method="kto")
    assert text in str(error.value)


def test_answers_that_become_equal_are_refused():
    row = FORMS[1] | {"chosen": [message("assistant", "Go")], "rejected": [{"from": "gpt", "value": "Go"}]}
    with pytest.raises(RowError, match="are equal"):
        answers_of(Record(row, "a:1"))
    with pytest.raises(RowError, match="this row has one answer"):
        answers_of(Record({"prompt": "a", "completion": "b"}, "a:1"))
