"""Variables of a chat template that can be set, and those that would have no effect."""

import pytest

from lorasmith.data.template.encoding import Template
from lorasmith.data.template.variables import check_variables
from lorasmith.errors import ConfigError
from tests.support.tiny import tokenizer

TEXT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is false %}<none>{% endif %}{% endif %}"
)


def test_a_variable_is_one_that_the_template_mentions():
    template = Template(tokenizer("llama"), "file", TEXT, (0,))
    check_variables(template, ["enable_thinking"])
    check_variables(template, [])
    with pytest.raises(ConfigError) as caught:
        check_variables(template, ["enable_thinkin", "depth"])
    assert caught.value.problems == (
        "data.template_kwargs: the chat template has no variable 'enable_thinkin'. Remove it. Did you mean "
        "'enable_thinking'?",
        "data.template_kwargs: the chat template has no variable 'depth'. Remove it.",
    )


def test_a_template_without_variables_has_none():
    with pytest.raises(ConfigError, match="has no variable 'enable_thinking'"):
        check_variables(Template(tokenizer("bloom"), "human-assistant", "", (0,)), ["enable_thinking"])
