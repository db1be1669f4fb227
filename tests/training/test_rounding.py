"""Stochastic rounding: right on average, one of two neighbors, and the same for the same seed."""

import pytest
import torch

from lorasmith.training.rounding import CHUNK, Rounding

CPU = torch.device("cpu")


def rounded(values: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    out = torch.empty_like(values, dtype=dtype)
    Rounding(seed, CPU).write(values, out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1 + 2**-9 + 2**-12, -1 - 2**-13, 0.3, -7e-4, 300.7])
def test_the_mean_is_the_value_and_each_a_neighbor(dtype, value):
    values = torch.full((20 * CHUNK + 5,), value)
    found = rounded(values, dtype)
    near = values[:1].to(dtype)
    others = [torch.nextafter(near, torch.full_like(near, end)) for end in (-torch.inf, torch.inf)]
    assert {float(x) for x in found.unique()} <= {float(near), *(float(x) for x in others)}
    step = max(abs(float(near - other)) for other in others)
    assert float(found.double().mean()) == pytest.approx(float(values[0]), abs=4 * step / (2 * len(values) ** 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_needs_no_rounding_is_kept(dtype):
    values = torch.randn(3 * CHUNK).to(dtype)
    assert torch.equal(rounded(values.float(), dtype), values)


def test_the_seed_decides():
    values = torch.randn(2 * CHUNK + 17)
    assert torch.equal(rounded(values, torch.bfloat16, 1), rounded(values, torch.bfloat16, 1))
    assert not torch.equal(rounded(values, torch.bfloat16, 1), rounded(values, torch.bfloat16, 2))


def test_roundings_of_chunks_and_of_tensors_are_independent():
    values, rounding = torch.full((2, CHUNK), 1 + 2**-8), Rounding(0, CPU)
    found = [torch.empty_like(values, dtype=torch.bfloat16) for _ in range(2)]
    for out in found:
        rounding.write(values, out)
    ups = torch.cat(found).float().gt(1).double() - 0.5
    assert float((ups @ ups.T / CHUNK * 4).fill_diagonal_(0).abs().max()) < 0.05
