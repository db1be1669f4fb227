"""Figures that `lorasmith report` derives from the losses of examples, with 95% confidence intervals by bootstrap."""

from dataclasses import dataclass

import torch

from lorasmith.evaluation.loss import (
    MIN_EXAMPLES,
    ExampleLosses,
    bootstrap_indices,
    confidence_interval,
    resampled_differences,
)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval; `examples` is the number in the smaller of its samples."""

    value: float
    low: float
    high: float
    examples: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero; never true with fewer than `MIN_EXAMPLES` examples."""
        return self.examples >= MIN_EXAMPLES and (self.low > 0 or self.high < 0)


Pair = tuple[ExampleLosses, ExampleLosses]  # of the base model and of the adapter


def generalization_gap(trained_on: Pair, held_out: Pair, seed: int = 0) -> Interval:
    """How much more the loss fell on examples of the training than on held-out ones, in nats per token.

    The difference of two differences, so it does not matter if one of the samples is the easier one. The two samples
    are resampled independently. Positive: a part of what was learned holds for the training examples only.
    """
    falls = [resampled_differences(*pair, seed + i) for i, pair in enumerate((trained_on, held_out))]
    low, high = confidence_interval(falls[1] - falls[0])
    value = (held_out[1].loss - held_out[0].loss) - (trained_on[1].loss - trained_on[0].loss)
    return Interval(value, low, high, min(len(pair[0].losses) for pair in (trained_on, held_out)))


def retained_share(before: ExampleLosses, after: ExampleLosses, reduced: ExampleLosses, seed: int = 0) -> Interval:
    """The part of the fall from `before` to `after` that is still there with `reduced`: 1 is all of it.

    The three are resampled together. Only meaningful if the loss fell significantly.
    """
    resamples = bootstrap_indices(len(before.losses), seed)
    whole, rest = ((before.losses - losses.losses)[resamples].sum(1) for losses in (after, reduced))
    low, high = confidence_interval((rest / whole).nan_to_num(0.0))
    value = float((before.losses - reduced.losses).sum() / (before.losses - after.losses).sum())
    return Interval(value, low, high, len(before.losses))


def by_change(before: ExampleLosses, after: ExampleLosses) -> list[int]:
    """The examples by the change of their loss per token, from the largest rise to the largest fall."""
    change = (after.losses - before.losses) / before.weights
    return torch.argsort(change, descending=True, stable=True).tolist()
