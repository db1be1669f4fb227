"""The prompt of a chat may begin with an answer, and end with the beginning of one, which the reply continues."""

import pytest

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.chat_prompt import chat_texts
from lorasmith.data.template.encoding import Template
from tests.support.tiny import tokenizer

ASKED = Message("user", "Hi")


def ids(template: Template, *messages: Message) -> list[int]:
    return template.ids_of(chat_texts(template, messages))


@pytest.mark.parametrize("family", ["llama", "bloom"])  # with a chat template, and without one
def test_a_reply_continues_the_last_answer(family):
    template = Template.of(tokenizer(family))
    asked = ids(template, ASKED)
    begun = ids(template, ASKED, Message("assistant", "Mice and"))
    assert begun[: len(asked)] == asked
    assert template.tokenizer.decode(begun[len(asked) :]).strip() == "Mice and"
    assert ids(template, ASKED, Message("assistant", "")) == asked


def test_an_answer_may_come_first():
    template = Template.of(tokenizer("llama"))
    text = template.tokenizer.decode(ids(template, Message("assistant", "Welcome!"), ASKED))
    assert text.index("Welcome!") < text.index("Hi")


def test_a_call_cannot_be_continued():
    template = Template.of(tokenizer("llama"))
    with pytest.raises(RowError, match="tool calls or reasoning, which a reply cannot continue"):
        ids(template, ASKED, Message("assistant", "", reasoning="Hm"))
