"""Prompts taken from examples: the ids of the prompt, the reference answer, and rows without a prompt."""

import pytest

from lorasmith.data.dataset.fit import truncate
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from lorasmith.evaluation.generation import prompts_from_examples
from lorasmith.model.row import Example
from tests.support.tiny import tokenizer

TALK = (
    Message("system", "Be short."),
    Message("user", "Why is the sky blue?"),
    Message("assistant", "The air scatters blue light."),
    Message("user", "考试有哪些技巧？\nReally?"),
    Message("assistant", "先做会做的题，再检查一遍。"),
)


@pytest.mark.parametrize("family", ["llama", "bloom"], ids=["chatml", "human-assistant"])
@pytest.mark.parametrize("turns", [TALK, TALK[:3], TALK[1:3]], ids=["second turn", "system", "plain"])
def test_the_last_answer_is_asked_for_with_the_prompt_of_the_training(family, turns):
    template = Template.of(tokenizer(family))
    (found,) = prompts_from_examples([template.encode(turns, "rows.jsonl:7")], template, 5)
    assert found.ids == template.encode_prompt(turns[:-1])
    assert found.reference == turns[-1].content
    assert found.source == "rows.jsonl:7"
    assert found.text in (turns[-2].content, f"Be short.\n\n{turns[-2].content}")


def test_as_many_as_are_asked_for_in_their_order():
    template = Template.of(tokenizer("llama"))
    examples = [template.encode((Message("user", f"{i}?"), Message("assistant", f"{i}!"))) for i in range(9)]
    assert [prompt.text for prompt in prompts_from_examples(examples, template, 3)] == ["0?", "1?", "2?"]
    assert len(prompts_from_examples(examples, template, 100)) == 9


def test_what_asks_nothing_or_was_cut_is_passed_over():
    template = Template.of(tokenizer("llama"))
    whole = template.encode(TALK[1:3])
    ids = tokenizer("llama")("Just a text.")["input_ids"]
    text = Example(ids, [*ids[1:], -100], [1.0] * len(ids), "text")
    assert len(prompts_from_examples([text, truncate(whole, len(whole.ids) - 4), whole], template, 5)) == 1
    with pytest.raises(DataError, match="none of the 2 held-out examples has a prompt and a complete answer"):
        prompts_from_examples([text, truncate(whole, len(whole.ids) - 4)], template, 5)
