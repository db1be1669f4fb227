"""The line through a curve, against closed formulas, and how often its interval contains the true slope."""

import math

import pytest
import torch

from lorasmith.evaluation.trend import t_quantile, trend


@pytest.mark.parametrize(
    ("degrees", "value", "limit"),
    [(2, 4.302653, 0.01), (3, 3.182446, 0.002), (4, 2.776445, 1e-3), (10, 2.228139, 1e-5), (120, 1.979930, 1e-6)],
)
def test_quantiles_of_student(degrees, value, limit):
    assert t_quantile(degrees) == pytest.approx(value, rel=limit)


def test_line_and_interval_without_correlation():
    """Residuals that alternate have no positive correlation, so the interval is the textbook's."""
    steps = list(range(0, 40, 2))
    points = [(step, 3.0 - 0.01 * step + 0.1 * (-1) ** i) for i, step in enumerate(steps)]
    found = trend(points)
    X = torch.tensor([[1.0, step] for step in steps], dtype=torch.float64)
    y = torch.tensor([value for _step, value in points], dtype=torch.float64)
    beta = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    residual = y - X @ beta
    variance = residual.square().sum() / (len(y) - 2) * torch.linalg.inv(X.mT @ X)[1, 1]
    half = 2.10092 * float(variance.sqrt())  # t, 18 degrees of freedom
    assert found is not None
    assert found.correlation == 0
    assert found.slope == pytest.approx(float(beta[1]))
    assert (found.low, found.high) == pytest.approx((float(beta[1]) - half, float(beta[1]) + half), rel=1e-5)
    assert (found.first, found.last, found.points) == (0, 38, 20)
    assert found.at(10) == pytest.approx(float(beta[0] + 10 * beta[1]))
    assert found.change[0] == pytest.approx(38 * float(beta[1]))


def test_unevenly_spaced_steps_do_not_move_the_line():
    found = trend([(step, 2 * step + 1.0) for step in (1, 2, 3, 5, 8, 13, 21, 34)])
    assert found is not None
    assert (found.slope, found.at(0), found.at(100)) == pytest.approx((2, 1, 201))
    assert found.high - found.low < 1e-9


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_the_interval_contains_the_truth_as_often_as_it_says(memory):
    """Also where neighboring points are alike, for which the usual formula is right in 75% only."""
    generator, hits, runs = torch.Generator().manual_seed(0), 0, 400
    for _run in range(runs):
        noise = torch.randn(100, generator=generator).tolist()
        value, points = 0.0, []
        for step, shock in enumerate(noise):
            value = memory * value + shock
            points.append((step, value - 0.02 * step))
        found = trend(points)
        assert found is not None
        hits += found.low <= -0.02 <= found.high
    assert 0.90 < hits / runs < 0.985


def test_too_little_to_tell():
    assert trend([(step, 1.0 * step) for step in range(7)]) is None
    assert trend([(step, float(step % 2)) for step in range(7)], least=4) is not None
    assert trend([(step, math.nan) for step in range(20)]) is None
    assert trend([(step, math.sin(step / 8)) for step in range(24)]) is None  # a wave, not a line with noise
