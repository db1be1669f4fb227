"""Parts of an answer that are not trained on."""

from types import SimpleNamespace

import pytest

from lorasmith.data.rows.conversation import Conversation, Message, Record
from lorasmith.data.template.answer_parts import mask_parts
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.loss_mask import ExampleBuilder
from lorasmith.errors import DataError

TEXT = "I'm doing very well, thank you!"


def learned(template, messages):
    example = template.encode(messages)
    return template.tokenizer.decode([target for target in example.targets if target >= 0])


@pytest.mark.parametrize("name", ["chatml", "llama3", None])
def test_only_the_other_tokens_and_the_end_are_trained_on(make, name):
    template = Template.of(make(name))
    asked, end = Message("user", "How are you?"), "<eos>" if name is None else template.jinja.end_of_turn
    end = end if isinstance(end, str) else template.token(template.jinja.end_of_turn()[0])
    answer = Message("assistant", TEXT, masked=((0, 9), (19, 31)))
    assert learned(template, [asked, answer]) == " very well" + end
    assert learned(template, [asked, answer._replace(masked=())]) == TEXT + end
    both = [asked, answer, asked, answer._replace(masked=((4, 31),))]
    assert learned(template, both) == f" very well{end}I'm {end}"


def test_a_slow_tokenizer_cannot_say_which_tokens_are_in_a_part():
    builder = ExampleBuilder(1, 1, answers=[(0, 5)])
    messages = (Message("user", "Hi"), Message("assistant", "Hello", masked=((0, 2),)))
    with pytest.raises(DataError, match="a line 1: training on parts of an answer needs a fast tokenizer"):
        mask_parts(builder, messages, SimpleNamespace(is_fast=False), "a:1")


def test_a_row_as_axolotl_documents_it(make):
    template = Template.of(make("chatml"))
    details = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 19, "end_offset": 30, "train": False},
    ]
    row = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": TEXT, "train_detail": details}]
    conversation = template.conversation(Record({"conversations": row}, "a:1"))
    assert learned(template, conversation.messages) == " very well<|im_end|>"


def test_an_answer_that_the_template_changes_is_refused(make):
    template = Template.of(make("reworded"))
    with pytest.raises(DataError, match="a line 1: only parts of an answer are to be trained on, but the template"):
        template.encode([Message("user", "Hi"), Message("assistant", TEXT, masked=((0, 3),))], "a:1")


def test_with_the_whole_text_learned_a_part_of_an_earlier_answer_cannot_be_left_out(make):
    template = Template.of(make("qwen3"))
    messages = (
        Message("user", "Hi"),
        Message("assistant", TEXT, masked=((0, 3),)),
        Message("user", "So?"),
        Message("assistant", "Yes"),
    )
    assert template.encode_row(Conversation(messages, "a:1"))
    with pytest.raises(
        DataError, match=r"a line 1: only parts of an answer are to be trained on, but with data\.learn 'all'"
    ):
        template.encode_row(Conversation(messages, "a:1"), "all")
