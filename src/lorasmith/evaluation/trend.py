"""The trend of a noisy curve, such as the end of a loss curve, with its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean

MIN_POINTS = 8  # with fewer, an interval from the scatter of the points says little
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Trend:
    """A least-squares line through points (step, value), and the 95% confidence interval of its slope per step.

    correlation: that of neighboring residuals, for which the interval is corrected; mean: of the values.
    """

    slope: float
    low: float
    high: float
    first: int
    last: int
    mean: float
    points: int
    correlation: float

    @property
    def change(self) -> tuple[float, float, float]:
        """(estimate, low, high) of the change from the first to the last point."""
        length = self.last - self.first
        return self.slope * length, self.low * length, self.high * length

    def at(self, step: float) -> float:
        """The value of the line at `step`."""
        return self.mean + self.slope * (step - (self.first + self.last) / 2)


def trend(points: Sequence[tuple[int, float]], least: int = MIN_POINTS) -> Trend | None:
    """The trend of `points`; None with fewer than `least` finite ones, or if they scatter too regularly to tell.

    Neighboring points of a curve are alike, so they count as n (1 - c) / (1 + c) independent ones, where c is the
    correlation of neighboring residuals (Santer et al. 2000, doi:10.1029/1999JD901105, section 2.1.3).
    """
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) < max(least, 3):
        return None
    n, mean_step, mean = len(points), fmean(step for step, _value in points), fmean(value for _step, value in points)
    spread = sum((step - mean_step) ** 2 for step, _value in points)
    slope = sum((step - mean_step) * (value - mean) for step, value in points) / spread
    residuals = [value - mean - slope * (step - mean_step) for step, value in points]
    total = sum(residual**2 for residual in residuals)
    together = sum(a * b for a, b in pairwise(residuals))
    correlation = max(together / total, 0.0) if total else 0.0
    independent = n * (1 - correlation) / (1 + correlation)
    if independent < 4:
        return None
    error = math.sqrt(total / (independent - 2) / spread)
    half = t_quantile(independent - 2) * error
    first, last = points[0][0], points[-1][0]
    centered = mean + slope * ((first + last) / 2 - mean_step)
    return Trend(slope, slope - half, slope + half, first, last, centered, n, correlation)


def t_quantile(degrees: float) -> float:
    """The 97.5% quantile of Student's t, within 1% for 2 and more degrees of freedom, 0.1% for 4 and more.

    The expansion in 1 / degrees of Abramowitz and Stegun, 26.7.5.
    """
    z, d = _Z, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / d**power for power, term in enumerate(terms, 1))
