"""Penalties against transformers' processor and OpenAI's formula."""

import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
)

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.sampling.penalty import PenalizedRow, TokenCounts, apply_penalties


def test_penalties_are_transformers_and_openais() -> None:
    """Rows of all kinds at once; the reply's tokens came one by one, more than there was room for at first."""
    logits, prompt, reply = torch.randn(4, 300), [3, 7, 7, 3, 299, 0], [5, 7, 5, *range(100, 250), 5]
    seen = TokenCounts(prompt)
    for token in reply:
        seen.add(token)
    settings = [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "presence_penalty": 0.5},
        {"frequency_penalty": -0.25, "presence_penalty": 1.5},
    ]
    found, counts = logits.clone(), torch.bincount(torch.tensor(reply), minlength=300)
    rows = [
        PenalizedRow(i, seen, SamplingConfig.model_validate(one)) for i, one in zip((0, 1, 3), settings, strict=True)
    ]
    apply_penalties(found, rows)
    for i, _seen, own in rows:
        expected = RepetitionPenaltyLogitsProcessor(own.repetition_penalty)(
            torch.tensor([prompt + reply]), logits[i : i + 1].clone()
        )[0]
        expected -= own.frequency_penalty * counts + own.presence_penalty * (counts > 0)
        torch.testing.assert_close(found[i], expected)
    assert torch.equal(found[2], logits[2])


def test_a_neutral_penalty_changes_no_bit() -> None:
    logits = torch.randn(1, 50)
    found = logits.clone()
    apply_penalties(found, [PenalizedRow(0, TokenCounts([1, 2, 3]), SamplingConfig())])
    assert torch.equal(found, logits)
