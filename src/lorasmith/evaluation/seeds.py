"""Comparison of two settings that were trained with several seeds, over held-out examples and over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasmith.evaluation.loss import Comparison, ExampleLosses, compare

# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom; with more, that of 30 is used, which is larger.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class SeedComparison:
    """The difference of two settings, other - one, with two 95% confidence intervals.

    examples: over held-out examples, of the losses averaged over seeds (paired bootstrap). seeds: over seeds, of the
    mean difference (Student's t on the differences of runs with the same seed); None with a single seed.
    """

    examples: Comparison
    seeds: tuple[float, float] | None
    runs: int

    @property
    def difference(self) -> float:
        """In nats per token; positive if the other setting is worse."""
        return self.examples.difference

    @property
    def exceeds_noise(self) -> bool:
        """Whether the difference is larger than what other examples and other seeds would change."""
        low, high = self.seeds or (self.examples.low, self.examples.high)
        return self.examples.is_significant and (low > 0 or high < 0)


def compare_over_seeds(one: Sequence[ExampleLosses], other: Sequence[ExampleLosses], seed: int = 0) -> SeedComparison:
    """Compare runs of two settings on the same examples; runs at the same place have the same seed of training."""
    compared = compare(_mean(one), _mean(other), seed)
    differences = [b.loss - a.loss for a, b in zip(one, other, strict=True)]
    return SeedComparison(compared, t_interval(differences), len(differences))


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% confidence interval of the mean of a few values (Student's t); None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = T_975[min(n - 1, len(T_975)) - 1] * deviation / math.sqrt(n)
    return mean - half, mean + half


def _mean(runs: Sequence[ExampleLosses]) -> ExampleLosses:
    return ExampleLosses(torch.stack([run.losses for run in runs]).mean(0), runs[0].weights)
