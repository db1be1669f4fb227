"""Figures derived from the losses of examples, against plain formulas."""

import pytest
import torch

from lorasmith.evaluation.interval import Interval, by_change, generalization_gap, retained_share
from lorasmith.evaluation.loss import ExampleLosses, bootstrap_indices


def losses(values: torch.Tensor) -> ExampleLosses:
    return ExampleLosses(values.double(), torch.arange(1, len(values) + 1, dtype=torch.float64))


def sample(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 10 + 1


def test_the_gap_is_the_difference_of_two_falls():
    train, held_out = sample(30, 0), sample(20, 1)
    pairs = (losses(train), losses(train * 0.5)), (losses(held_out), losses(held_out * 0.9))
    found = generalization_gap(*pairs, seed=3)
    falls = [pair[0].loss - pair[1].loss for pair in pairs]
    assert found.value == pytest.approx(falls[0] - falls[1])
    assert found.examples == 20
    draws = []
    for pair, seed in zip(pairs, (3, 4), strict=True):
        index = bootstrap_indices(len(pair[0].losses), seed)
        draws.append((pair[1].losses - pair[0].losses)[index].sum(1) / pair[0].weights[index].sum(1))
    quantiles = torch.quantile(draws[1] - draws[0], torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert [found.low, found.high] == pytest.approx(quantiles.tolist())
    assert found.is_significant
    assert found.low < found.value < found.high


def test_no_gap_where_both_fall_alike():
    train, held_out = sample(40, 0), sample(40, 1)
    found = generalization_gap((losses(train), losses(train - 1)), (losses(held_out), losses(held_out - 1)))
    assert found.value == pytest.approx(0)
    assert not found.is_significant


def test_what_remains_of_an_improvement():
    before = sample(25, 0)
    after = before - sample(25, 1) / 4
    for share in (1.0, 0.6, 0.0, -0.5):
        found = retained_share(losses(before), losses(after), losses(before + share * (after - before)))
        assert (found.value, found.low, found.high) == pytest.approx((share, share, share))
    mixed = retained_share(losses(before), losses(after), losses(torch.where(before > 6, before, after)))
    assert 0 < mixed.low < mixed.value < mixed.high < 1


def test_an_interval_needs_examples():
    assert Interval(1, 0.5, 2, 10).is_significant
    assert not Interval(1, 0.5, 2, 9).is_significant
    assert not Interval(1, -0.5, 2, 100).is_significant


def test_the_order_is_by_change_per_token():
    before = ExampleLosses(torch.tensor([4.0, 4, 4]).double(), torch.tensor([1.0, 4, 2]).double())
    after = ExampleLosses(torch.tensor([3.0, 2, 4]).double(), before.weights)
    assert by_change(before, after) == [2, 1, 0]  # 0, -0.5 and -1 per token
