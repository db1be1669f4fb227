"""What a training will keep for backward, foretold from a trial of two dozen tokens."""

import pytest
import torch

from lorasmith.model.head import loss_sum
from lorasmith.model.kept import counted
from lorasmith.preflight.estimate import expected_mib, growth_mib
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


def test_the_peak_grows_with_the_row_and_is_not_foretold_where_nothing_was_tried() -> None:
    base, _adapter = fast_base("llama", torch.float32)
    small, large = (expected_mib(base, one_row(examples(lengths)), 1000) for lengths in ((5, 6), (60,) * 40))
    assert small is not None
    assert large is not None
    assert large > small
    base.kept_per_token = 0.0
    assert expected_mib(base, one_row(examples((5, 6))), 1000) is None


def test_a_system_that_does_not_say_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _adapter = fast_base("llama", torch.float32)
    monkeypatch.setattr("lorasmith.preflight.estimate.memory_mib", lambda: None)
    assert expected_mib(base, one_row(examples((5, 6))), 1000) is None


def test_only_where_every_shape_is_compiled_memory_grows_with_the_steps() -> None:
    row = one_row(examples((50, 40)))
    single, half = (fast_base("llama", dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert growth_mib(single, row, 100) == 0
    assert growth_mib(half, row, 100) == growth_mib(half, row, 200) > growth_mib(half, row, 1) > 0
