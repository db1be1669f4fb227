"""What of a row is learned: answers, the last one, all of it, by message, and plain text."""

import dataclasses

import pytest

from lorasmith.data.rows.conversation import Conversation, Message
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from lorasmith.model.row import IGNORED, Example

ASK, ANSWER, MORE, LAST = (
    Message("user", "what is the sky?"),
    Message("assistant", "the sky is blue."),
    Message("user", "考试有哪些技巧？"),
    Message("assistant", "先做会做的题。"),
)
END = "<|im_end|>"


def row(*messages: Message) -> Conversation:
    return Conversation(messages, "a.jsonl:1")


def learned(template: Template, example: Example) -> str:
    return template.tokenizer.decode([target for target in example.targets if target != IGNORED])


def weights(example: Example) -> set[float]:
    return {w for w, target in zip(example.weights, example.targets, strict=True) if target != IGNORED}


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", None])
def test_the_last_answer_alone(make, name):
    template = Template.of(make(name))
    (example,) = template.encode_row(row(ASK, ANSWER, MORE, LAST), "last-answer")
    assert learned(template, example).endswith(LAST.content + ("<eos>" if name is None else END))
    assert ANSWER.content not in learned(template, example)
    prompt = template.encode_prompt((ASK, ANSWER, MORE))
    assert example.ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3", None])
def test_all_is_learned_up_to_the_last_stop_token(make, name):
    template = Template.of(make(name))
    (example,) = template.encode_row(row(ASK, ANSWER, MORE, LAST, MORE), "all")
    first = template.tokenizer.decode(example.ids[:1])
    text = first + learned(template, example)
    assert template.render((ASK, ANSWER, MORE, LAST)).rstrip("\n") == text
    assert example.targets[example.useful_length - 1] in template.stop_ids


def test_messages_say_what_they_count(make):
    template = Template.of(make("qwen2.5"))
    (example,) = template.encode_row(row(ASK, ANSWER._replace(learn=False), MORE, LAST._replace(weight=0.5)))
    assert learned(template, example) == LAST.content + END
    assert (weights(example), example.weight) == ({0.5}, 0.5 * example.n_targets)
    (both,) = template.encode_row(row(ASK, ANSWER._replace(weight=2), MORE, LAST._replace(weight=0)))
    assert (learned(template, both), weights(both)) == (ANSWER.content + END, {2})
    (whole,) = template.encode_row(row(ASK._replace(weight=0.25), ANSWER), "all")
    assert weights(whole) == {0.25, 1.0}


def test_a_row_that_teaches_nothing_or_not_to_stop_is_refused(make):
    template = Template.of(make("chatml"))
    silent = ANSWER._replace(learn=False)
    with pytest.raises(
        DataError, match=r"^a\.jsonl line 1: nothing in this row is trained on: its answers have 'learn' false"
    ):
        template.encode_row(row(ASK, silent))
    with pytest.raises(DataError, match=r"the last token that is trained on, '.+', is not a stop token"):
        template.encode_row(row(ASK, silent), "all")
    with pytest.raises(DataError, match="the messages before an answer must all have the same 'learn' and 'weight'"):
        template.encode_row(row(Message("system", "Be kind.", learn=False), ASK, ANSWER), "all")


def test_an_answer_that_is_not_learned_needs_no_stop_and_no_beginning(make):
    template = Template.of(make("qwen3"))
    first, second = template.encode_row(row(ASK, ANSWER, MORE, LAST))
    assert template.encode_row(row(ASK, ANSWER._replace(learn=False), MORE, LAST)) == [second]
    assert template.encode_row(row(ASK, ANSWER, MORE, LAST._replace(learn=False))) == [first]


@pytest.mark.parametrize("name", ["chatml", None])
def test_plain_text_is_learned_whole_with_eos_at_its_end(make, name):
    template = Template.of(make(name))
    text = "the sky is blue. 考试"
    for learn in ("answers", "all", "last-answer"):
        (example,) = template.encode_row(Conversation((), "a:1", text=text), learn)
        assert example.ids[0] == template.tokenizer.bos_token_id  # this tokenizer begins texts with it
        assert learned(template, example) == text + "<eos>"
        assert example.targets == [*example.ids[1:], IGNORED]
    without = dataclasses.replace(template, stop_ids=(1,))
    with pytest.raises(DataError, match="plain text must end with the tokenizer's EOS token"):
        without.encode_row(Conversation((), "a:1", text=text))
