"""The prompts are those of the training."""

from lorasmith.data.template.encoding import Template
from lorasmith.data.template.golden import PROBES
from lorasmith.export.readback.prompts import QUESTIONS, prompts_of
from tests.support.tiny import tokenizer


def test_prompts_are_those_of_the_training():
    template = Template.of(tokenizer("llama"))
    found = prompts_of(template)
    assert len(found) == 20
    assert found[0][0] == [{"role": "user", "content": PROBES[0][0].content}]
    assert found[3][1] == template.encode_prompt(PROBES[2][:3])
    assert found[-1][0][0]["content"] == QUESTIONS[-1]
