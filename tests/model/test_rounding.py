"""Whether a difference is rounding: by a tolerance, else by how much rounding errors move the model itself."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorasmith.model.base import Base
from lorasmith.model.rounding import FARTHEST, TOLERANCE, differ_by_rounding, rounding_errors
from tests.support.families import distance, logits_of, tiny_base

LARGE = 8.0  # as many times as much noise as rounding makes: more than the tolerance of bfloat16


def never() -> Sequence[Tensor]:
    raise AssertionError("the usual tolerance decides")


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama", torch.bfloat16)


def test_within_the_tolerance_nothing_is_measured(base: Base) -> None:
    wanted = torch.ones(4)
    assert differ_by_rounding(base, [wanted], [wanted], never)
    assert differ_by_rounding(base, [wanted * (1 + 0.9 * TOLERANCE[torch.bfloat16])], [wanted], never)


@pytest.mark.parametrize("far", [1 + 1.1 * FARTHEST, float("nan"), float("inf")])
def test_what_is_too_far_is_never_rounding(far: float, base: Base) -> None:
    assert not differ_by_rounding(base, [torch.ones(4), torch.ones(4) * far], [torch.ones(4)] * 2, never)


@pytest.mark.parametrize(("share", "allowed"), [(0.5, True), (4.0, False)])
def test_between_the_two_the_noise_of_the_model_decides(share: float, allowed: bool, base: Base) -> None:
    def again() -> list[Tensor]:
        return [wanted + LARGE * (logits_of(base) - wanted)]

    wanted = logits_of(base)
    with rounding_errors(base.model, 99):
        noise = distance(again()[0], wanted)
    assert noise * 0.5 > 0.05, "the tolerance alone would allow it"
    off = wanted * (1 + min(share * noise, 0.99 * FARTHEST))
    far_noise = [wanted + (again()[0] - wanted) * (1.0 if allowed else 0.1)]
    assert differ_by_rounding(base, [off], [wanted], again if allowed else lambda: far_noise) == allowed


def test_errors_are_of_one_rounding_follow_the_seed_and_end_with_the_block(base: Base) -> None:
    wanted = logits_of(base)
    found = []
    for seed in (1, 1, 2):
        with rounding_errors(base.model, seed):
            found.append(logits_of(base))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert 1e-3 < distance(found[0], wanted) < TOLERANCE[torch.bfloat16]
    assert torch.equal(logits_of(base), wanted)
    assert not any(module._forward_hooks for module in base.model.modules())
