"""What a training will keep for backward, foretold from a trial of two dozen tokens."""

import pytest
import torch

from lorasmith.model.head import loss_sum
from lorasmith.model.kept import counted
from tests.support.families import examples, one_row
from tests.support.fast_base import fast_base


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_longer_row_keeps_what_the_trial_foretold(family: str) -> None:
    base, _adapter = fast_base(family, torch.float32)
    row = one_row(examples((50, 40, 45, 38)))
    with counted(base.model) as found:
        loss_sum(base, row)
    foretold = row.tokens * base.kept_per_token
    assert foretold == pytest.approx(sum(found.values()), rel=0.1)
