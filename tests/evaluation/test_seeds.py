"""Intervals over examples and over seeds, against independent computations."""

import math
import statistics

import pytest
import torch

from lorasmith.evaluation.loss import ExampleLosses, compare
from lorasmith.evaluation.seeds import T_975, compare_over_seeds, t_interval


def run(shift: float, seed: int, examples: int = 60) -> ExampleLosses:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, examples + 1, dtype=torch.float64)
    noise = 0.02 * torch.randn(examples, generator=generator, dtype=torch.float64)
    return ExampleLosses((2 + shift + noise) * weights, weights)


def test_the_quantiles_are_those_of_student():
    """The density of t, integrated numerically up to each value, is 0.975."""
    for degrees in (1, 2, 3, 10, 30):
        x = torch.linspace(0, T_975[degrees - 1], 200_001, dtype=torch.float64)
        constant = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
        density = constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        assert 0.5 + float(torch.trapezoid(density, x)) == pytest.approx(0.975, abs=2e-5)


def test_an_interval_of_a_few_values():
    values = [1.0, 2.0, 4.0]
    low, high = t_interval(values)
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert t_interval([1.0]) is None
    assert t_interval([]) is None
    many = t_interval([float(i % 2) for i in range(100)])
    assert many[1] - many[0] == pytest.approx(2 * 2.042 * statistics.stdev([float(i % 2) for i in range(100)]) / 10)


def test_a_single_seed_is_the_paired_comparison():
    one, other = run(0, 1), run(0.1, 2)
    compared = compare_over_seeds([one], [other], seed=3)
    assert compared.examples == compare(one, other, 3)
    assert compared.seeds is None
    assert compared.exceeds_noise


def test_runs_of_the_same_seed_are_paired():
    """What both runs of a seed share does not widen the interval over seeds."""
    shared = [0.0, 0.5, -0.3]
    one = [run(s, i) for i, s in enumerate(shared)]
    other = [run(s + 0.05, i) for i, s in enumerate(shared)]
    compared = compare_over_seeds(one, other)
    assert compared.difference == pytest.approx(0.05, abs=1e-12)
    assert compared.seeds == pytest.approx((0.05, 0.05), abs=1e-9)
    assert compared.runs == 3
    assert compared.exceeds_noise
    mixed = compare_over_seeds(one, [other[1], other[2], other[0]])
    assert mixed.seeds[0] < 0 < mixed.seeds[1]
    assert not mixed.exceeds_noise, "although it is significant over examples"
    assert mixed.examples.is_significant


def test_no_difference_of_equal_settings_exceeds_the_noise():
    one, other = [run(0, i) for i in range(3)], [run(0, i + 10) for i in range(3)]
    assert not compare_over_seeds(one, other).exceeds_noise
