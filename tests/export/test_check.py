"""Replies of likeliest tokens, and prompts, with which a file is compared. The comparisons are in test_export.py."""

from types import SimpleNamespace
from typing import Any

import torch

from lorasmith.data.template.encoding import Template
from lorasmith.data.template.golden import PROBES
from lorasmith.export.check import greedy, prompts_of
from tests.support.tiny import tokenizer


class Counting:
    """A model whose next token is the last one plus 1."""

    device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids + 1, 100).float())


def test_a_reply_ends_with_the_end_token_or_the_context():
    model: Any = Counting()
    assert greedy(model, [3], [7], 50) == [4, 5, 6, 7]
    assert greedy(model, [7], [7], 3) == [8, 9]
    assert len(greedy(model, [1], [], 99)) == 32


def test_prompts_are_those_of_the_training():
    template = Template.of(tokenizer("llama"))
    found = prompts_of(template)
    assert len(found) == 4
    assert found[0][0] == [{"role": "user", "content": PROBES[0][0].content}]
    assert found[3][1] == template.encode_prompt(PROBES[2][:3])
