"""Where system messages go, answers before the first question, and contents that the rendered text lacks."""

import pytest

from lorasmith.data.rows.conversation import Message, RowError
from lorasmith.data.template.contents import ContentOptions, refuse_hidden, shows
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.turns import Turn
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.tokenizers import tokenizer_for

CHAT = (
    Message("system", "Be brief."),
    Message("user", "Q?"),
    Message("system", "In rhymes."),
    Message("user", "More?"),
    Message("assistant", "A."),
)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("system", CHAT),
        ("first", (Message("system", "Be brief.\n\nIn rhymes."), CHAT[1], *CHAT[3:])),
        ("user", (Message("user", "Be brief.\n\nQ?"), Message("user", "In rhymes.\n\nMore?"), CHAT[4])),
    ],
)
def test_system_messages_go_where_the_option_says(where, wanted):
    arranged = ContentOptions(system_as=where).arrange(CHAT)
    assert tuple(arranged) == wanted
    assert tuple(ContentOptions(system_as=where).arrange(arranged)) == wanted  # once more changes nothing


def test_a_template_without_a_place_for_system_messages_takes_them_as_part_of_the_question():
    one = BEHAVIORS["no place for a system message"]
    tokenizer = tokenizer_for(one.text, "<s>", one.eos, one.ends)
    messages = (CHAT[0], CHAT[1], CHAT[4])
    with pytest.raises(RowError, match=r"does not show message 1 \(system\)"):
        Template.of(tokenizer).encode(messages)
    template = Template.of(tokenizer, options=ContentOptions(system_as="user"))
    assert "Be brief.\n\nQ?" in tokenizer.decode(template.encode(messages).ids)
    assert (
        template.encode_prompt(messages[:2])
        == template.encode(messages).ids[: len(template.encode_prompt(messages[:2]))]
    )
    always = Template.of(tokenizer, system="Be brief.", options=ContentOptions(system_as="user"))
    assert always.encode(messages[1:]) == template.encode(messages)
    assert always.with_system(always.with_system(messages[1:])) == always.with_system(messages[1:])


def test_answers_before_the_first_question_are_refused_or_dropped(make):
    messages = (CHAT[0], CHAT[4], CHAT[1], CHAT[4])
    kept = ContentOptions(leading_answer="drop").arrange(messages)
    assert tuple(kept) == (CHAT[0], CHAT[1], CHAT[4])
    with pytest.raises(RowError, match="the first message is an answer"):
        Template.of(make("chatml")).encode(messages[1:])
    assert Template.of(make("chatml"), options=ContentOptions(leading_answer="drop")).encode(messages[1:])


def test_whitespace_may_differ_and_nothing_else():
    assert shows("a\n  b c", " a b\nc ")
    assert not shows("a b", "a c")
    refuse_hidden([Message("user", "Q?"), Message("assistant", "A B")], Turn("Q?", "A\nB", True, 0, 1), "row")
    with pytest.raises(RowError, match=r"^a line 3: the chat template does not show message 1 \(user\)"):
        refuse_hidden([Message("user", "Q?"), Message("assistant", "A")], Turn("?", "A", True, 0, 1), "a:3")
