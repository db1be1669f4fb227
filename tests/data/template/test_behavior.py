"""What a chat template does, found by rendering it. The whole list of behaviors is in tests/data/corpus."""

import pytest

from lorasmith.data.template.behavior import Behavior, common_length, inline
from lorasmith.data.template.encoding import Template
from tests.data.corpus.behaviors import BEHAVIORS
from tests.data.corpus.tokenizers import tokenizer_for


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("opened thought in the prompt", Behavior(dropped="<think>\n", reasoning="inline")),
        ("empty thought in the prompt", Behavior(dropped="<|channel>thought\n<channel|>", reasoning="inline")),
        ("prompt that shares half a token", Behavior(dropped="<|START_THINKING|>", reasoning="inline")),
        ("no generation prompt", Behavior(header="<|im_start|>assistant\n", reasoning="inline")),
        ("other blank lines before the prompt", Behavior(header="\n\n### Response:\n", reasoning="inline")),
        ("reasoning under thinking", Behavior(reasoning="reasoning_content")),  # which transformers copies
        ("reasoning cut out of the content", Behavior()),
        ("contents as parts", Behavior(reasoning="inline", parts=True)),
        ("arguments as text", Behavior(reasoning="inline", text_arguments=True)),
        ("arguments as an object", Behavior(reasoning="inline")),
    ],
)
def test_each_behavior_is_found(name, wanted):
    one = BEHAVIORS[name]
    assert Template.of(tokenizer_for(one.text, "<s>", one.eos, one.ends)).jinja.behavior == wanted


def test_a_template_that_needs_a_list_of_tools_gets_an_empty_one():
    text = "{%- for t in tools %}{{ t.function.name }}{%- endfor %}{%- for m in messages %}{{ m.content }}{%- endfor %}"
    assert Template.of(tokenizer_for(text, "<s>", "</s>")).jinja.behavior.no_tools == ()


def test_ordinary_templates_have_no_behavior_of_their_own(make):
    for name in ("chatml", "llama3", "gemma", "qwen3", "mistral"):
        behavior = Template.of(make(name)).jinja.behavior
        assert (behavior.dropped, behavior.header) == ("", ""), name


def test_the_common_length_of_texts():
    assert common_length(["abc", "abd", "ab"]) == 2
    assert common_length(["", "a"]) == 0
    assert inline("why", "so") == "<think>\nwhy\n</think>\n\nso"
