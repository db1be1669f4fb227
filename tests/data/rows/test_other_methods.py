"""Rows of other training methods are named, and never read as examples."""

import pytest

from lorasmith.data.rows.formats import row_problem
from lorasmith.data.rows.other_methods import media_column, other_method, scores
from tests.support.row_files import CHAT, ROW

ASKED = CHAT["messages"][:1]
PREFERENCE = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: GO AWAY"},
    {"system": "", "question": "Hi", "chosen": "Hello", "rejected": "GO AWAY"},
    {"prompt": ASKED, "chosen": CHAT["messages"][1:], "rejected": [{"role": "assistant", "content": "GO AWAY"}]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
     "rejected": {"from": "gpt", "value": "GO AWAY"}},
    CHAT | {"rejected_response": "GO AWAY"},
    CHAT | {"rejected_messages": CHAT["messages"]},
    ROW | {"output": ["Hello", "GO AWAY"]},
    {"input": {"messages": ASKED}, "preferred_output": CHAT["messages"], "non_preferred_output": CHAT["messages"]},
    {"question": "Hi", "chosen": "Hello"},
    {"prompt": "Hi", "response_a": "Hello", "response_b": "GO AWAY", "winner": "a"},
    {"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": CHAT["messages"],
     "conversation_b": CHAT["messages"]},
    {"domain": "cooking", "history": "Hi", "human_ref_A": "Hello", "human_ref_B": "GO AWAY", "labels": 1},
    {"Type": "a", "Category": "b", "Question": "Hi?", "Best Answer": "Hello", "Correct Answers": "Hello; Hi",
     "Incorrect Answers": "GO AWAY", "Source": "c"},
    {"question": "Hi", "correct_answers": ["Hello"], "incorrect_answers": ["GO AWAY"]},
    {"prompt": "Hi", "best": "Hello", "worst": "GO AWAY"},
    {"prompt": "Hi", "pos_answer": "Hello", "neg_answer": "GO AWAY"},
    {"prompt": "Hi", "response_w": "Hello", "response_l": "GO AWAY"},
    {"prompt": "Hi", "model_a_answer": "Hello", "model_b_answer": "GO AWAY"},
    {"prompt": "Hi", "responses": ["Hello", "GO AWAY"], "scores": [1, 0]},
]  # fmt: skip


@pytest.mark.parametrize("row", PREFERENCE)
def test_preference_rows(row):
    text = row_problem(row, None)
    assert text.startswith("this is a preference row ('")
    assert "--method dpo, orpo, simpo or kto" in text
    assert "--map" not in text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (CHAT | {"label": False}, "this row has 'label': false, which marks a good or a bad answer"),
        (ROW | {"kto_tag": "True"}, "this row has 'kto_tag': \"True\", which"),
        (ROW | {"kto_tag": 0}, "this row has 'kto_tag': 0, which"),
        (CHAT | {"kto_label": "1"}, "this row has 'kto_label': \"1\", which"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "for a process reward model"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}, "this row holds token ids"),
        ({"query": "a", "pos": ["b"], "neg": ["c"]}, "for training an embedding model"),
    ],
)
def test_other_rows(row, text):
    assert text in other_method(row, is_known="messages" in row or "output" in row)


@pytest.mark.parametrize(
    "row",
    [CHAT, ROW, ROW | {"kto_tag": None, "kto_label": "", "label": 0},
     ROW | {"label": "positive", "rejected": False}, CHAT | {"chosen": None, "rejected": None},
     CHAT | {"input_ids": [1]}, ROW | {"instruction": ["a", "b"], "output": ["c", "d"]},
     ROW | {"answer_a": "x", "answer_b": "y"}, ROW | {"correct_answer": "x", "wrong_answer": "y"},
     ROW | {"winner": "x", "loser": "y"}],
)  # fmt: skip
def test_rows_that_are_examples(row):
    assert other_method(row, is_known=True) is None
    assert row_problem(row, None) is None or "messages" in row or "output" in row


def test_a_correction_is_no_preference():
    assert other_method({"incorrect": "Helo", "correct": "Hello"}, is_known=False) is None
    assert "--map instruction=question output=answer" in row_problem(
        {"question": "Hi", "answer": "Hello", "wrong_answer": "GO AWAY"}, None
    )


def test_columns_of_scores_and_of_images():
    assert scores(["id", "Rating", "score"]) == ["Rating", "score"]
    assert media_column({"image": "", "images": [], "audio": "a.wav"}) == "audio"
    assert media_column(CHAT) is None
