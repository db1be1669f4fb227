"""Dialogues in one text become messages."""

import pytest

from lorasmith.data.rows.dialogue import dialogue


def test_each_turn_is_a_message():
    text = "\n\nHuman: Hi: there\nall\n\nAssistant: Hello.\n\nHow?\n\nHuman:Fine\n\nAssistant: Good"
    assert dialogue(text) == [
        {"role": "user", "content": "Hi: there\nall"},
        {"role": "assistant", "content": "Hello.\n\nHow?"},
        {"role": "user", "content": "Fine"},
        {"role": "assistant", "content": "Good"},
    ]


def test_a_prompt_that_is_to_be_continued_ends_with_the_question():
    assert dialogue("\n\nHuman: Hi\n\nAssistant:") == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "text", ["", "Hello", "\n\nAssistant: Hi", "\n\nHuman: Hi", "He said\n\nHuman: a\n\nAssistant: b", None, 3, ["a"]]
)
def test_other_text_is_none(text):
    assert dialogue(text) is None
