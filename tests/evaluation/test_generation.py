"""Prompts taken from examples: the ids of the prompt, the reference answer, and rows without a prompt."""

import copy

import pytest

from lorasmith.config.sampling import SamplingConfig
from lorasmith.data.dataset.fit import truncate
from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.encoding import Template
from lorasmith.errors import DataError
from lorasmith.evaluation.generation import Answer, Frame, GenerationEvaluation, prompts_from_examples
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


# Chat templates that write reasoning before an answer, as Qwen3 (empty, in the answer), R1 (begun, in the prompt) and
# gemma-4 (a word between special tokens) do.
HEAD = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ THOUGHT }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}PROMPT{% endif %}"
)
EMPTY = HEAD.replace("THOUGHT", "'<think>\n\n</think>\n\n'").replace("PROMPT", "")
IN_PROMPT = HEAD.replace("THOUGHT", "'<think>\n'").replace("PROMPT", "{{ '<think>\n' }}")
SPECIAL = HEAD.replace("THOUGHT", "'<|im_start|>thought\n<|im_start|>'").replace("PROMPT", "")
AROUND = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</' + m.role + '><|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PLAIN = HEAD.replace("THOUGHT", "''").replace("PROMPT", "")


def template_of(text: str) -> Template:
    own = copy.deepcopy(tokenizer("llama"))
    own.chat_template = text
    return Template.of(own)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (EMPTY, Frame("think", "<think>\n\n</think>")),
        (IN_PROMPT, Frame("think", "")),
        (SPECIAL, Frame("", "thought")),
        (PLAIN, Frame()),
        (AROUND, Frame("", "", "</assistant>")),
    ],
    ids=["empty", "in the prompt", "special tokens", "none", "a tag around the answer"],
)
def test_what_the_template_writes_around_an_answer_is_not_scored(text: str, wanted: Frame) -> None:
    template = template_of(text)
    assert Frame.of(template) == wanted
    example = template.encode((Message("user", "2+2?"), Message("assistant", "It is four.")))
    found = GenerationEvaluation.from_examples([example], template, 1, SamplingConfig(), [])
    assert [prompt.reference for prompt in found.prompts] == ["It is four."]
    replies = ["It is four.", wanted.before + "\n\nIt is four.", wanted.before + "\n\nIt is five."]
    if wanted.tag:
        replies[1:2] = ["<think>Two and two.</think>\n\nIt is four.", "Two and two.</think>\n\nIt is four."]
    exact = next(metric for metric in found.metrics if metric.key == "exact")
    scores = [found.statistics(exact, [Answer(reply, "stop")]).tolist() for reply in replies]
    assert scores == [[[100.0, 1.0]]] * (len(replies) - 1) + [[[0.0, 1.0]]]


def test_reasoning_that_does_not_end_has_no_answer() -> None:
    frame = Frame("think", "<think>\n\n</think>")
    assert frame.content("<think>It may be four, or") == ""
    assert frame.content("It is <think> four") == "It is <think> four"
    assert Frame().content("<think>four</think>") == "<think>four</think>"


def test_a_later_turn_is_shown_without_the_words_of_a_template_with_a_default_system_prompt():
    """Such a template ends a system message before the first user message, and an answer before any other."""
    template = template_of("{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}" + PLAIN)
    (found,) = prompts_from_examples([template.encode(TALK[1:], "rows.jsonl:7")], template, 5)
    assert found.text == TALK[3].content
