"""Where answers end, and what is refused, when a row becomes examples. See also tests/data/corpus."""

import pytest

from lorasmith.data.rows.conversation import Conversation, Message, RowError
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.examples import build_examples, missing_stop, plain_example
from lorasmith.model.row import IGNORED
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.tokenizers import tokenizer_for

CHAT = (Message("user", "Q?"), Message("assistant", "A."), Message("user", "R?"), Message("assistant", "B."))


def template_of(name: str) -> Template:
    one = BEHAVIORS[name]
    tokenizer = tokenizer_for(one.text, "<s>", one.eos, one.ends)
    return Template.of(tokenizer, "model", tokenizer.convert_tokens_to_ids(list(one.ends)))


def test_the_token_that_begins_the_next_message_ends_an_answer():
    template = template_of("the next role ends an answer")
    (builder,) = build_examples(template, Conversation(CHAT, "row"), "answers")
    end = template.tokenizer.convert_tokens_to_ids("<|user|>")
    example = builder.build("row")
    assert [t for t in example.targets if t == end] == [end, end]
    assert example.ids[-1] == end  # after the last answer, where the template writes nothing
    (turn,) = (turn for turn in template.turns(CHAT[:2]) if turn.answer)
    assert missing_stop(template, turn, CHAT[:2], ()) == end


def test_an_answer_without_any_end_is_an_example_of_its_own():
    template = template_of("no end at all")
    examples = template.encode_all(CHAT)
    assert len(examples) == 2
    assert all(example.ids[-1] == template.end_id for example in examples)
    assert template.end_id not in examples[1].ids[:-1]  # the earlier answer has none, as at inference


def test_a_generation_config_that_names_no_end_leaves_the_row_refused():
    one = BEHAVIORS["no end at all"]
    with pytest.raises(RowError, match="does not end with a stop token"):
        Template.of(tokenizer_for(one.text, "<s>", one.eos)).encode_all(CHAT)


def test_plain_text_that_begins_with_the_begin_token_has_it_once(make):
    template = Template.of(make())
    begin = template.tokenizer.bos_token_id
    for text in ("what is the sky", f"{template.tokenizer.bos_token}what is the sky"):
        example = plain_example(template, text, "row")
        assert example.ids.count(begin) == 1
        assert begin not in [t for t in example.targets if t != IGNORED]
