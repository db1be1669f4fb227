"""Held-out loss of the base model and of adapters, and a paired bootstrap that tells whether they differ."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorasmith.data.dataset.plan import pack_rows
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of, shares_prefixes
from lorasmith.model.head import token_losses
from lorasmith.model.row import Example, Row, laid_length
from lorasmith.report import Report

RESAMPLES = 2000  # of the bootstrap
MIN_EXAMPLES = 10  # with fewer, a bootstrap interval is too unreliable to call a difference significant
EVAL_ROW_TOKENS = 2048  # tokens of one packed row
LARGEST_EXPONENT = 709.0  # math.exp raises OverflowError a little above


@dataclass(frozen=True)
class ExampleLosses:
    """The sum of the weighted token losses of each example, and of its weights: float64 of shape (examples,)."""

    losses: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """Weighted mean loss per target token, in nats."""
        return float(self.losses.sum() / self.weights.sum())


@dataclass(frozen=True)
class Comparison:
    """Two results on the same examples, and the 95% confidence interval of their difference.

    A loss in nats here; subclasses hold other metrics.
    """

    before: float
    after: float
    low: float
    high: float
    examples: int

    @property
    def difference(self) -> float:
        """after - before: negative if the loss went down."""
        return self.after - self.before

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero; never true with fewer than `MIN_EXAMPLES` examples."""
        return self.examples >= MIN_EXAMPLES and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """`is_significant` and its direction in words."""
        if self.examples < MIN_EXAMPLES:
            return _("too few examples to tell; hold out more with --held-out")
        if not self.is_significant:
            return _("no significant difference")
        if self.difference > 0:
            return _("significantly WORSE than the base model; lowering training.learning_rate usually fixes this")
        return _("significantly better")

    def __str__(self) -> str:
        return _(
            "held-out loss {before:.4f} -> {after:.4f} (perplexity {ppl_before:.1f} -> {ppl_after:.1f}); "
            "difference {difference:+.4f}, 95% confidence interval [{low:+.4f}, {high:+.4f}] on {examples} "
            "held-out examples: {verdict}",
            before=self.before,
            after=self.after,
            ppl_before=perplexity(self.before),
            ppl_after=perplexity(self.after),
            difference=self.difference,
            low=self.low,
            high=self.high,
            examples=self.examples,
            verdict=self.verdict,
        )


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is no float any more, as after a training that diverged."""
    return math.inf if loss > LARGEST_EXPONENT else math.exp(loss)


class ProcessGroup(Protocol):
    """The processes that share an evaluation, such as `training.distributed.World`."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over all processes, in place."""


def evaluate_loss(
    base: Base,
    examples: Sequence[Example],
    adapter: str | None,
    report: Report | None = None,
    task: str = "",
    world: ProcessGroup | None = None,
) -> ExampleLosses:
    """The losses of `examples` under `adapter` (None: the base model alone), without dropout and without gradient.

    The processes of `world` share the rows, and each returns the losses of all examples, the same as one process would.
    """
    losses = torch.zeros(len(examples), dtype=torch.float64)
    weights = torch.tensor([example.weight for example in examples], dtype=torch.float64)
    for members, row, losses_N in evaluated_rows(base, examples, adapter, report, task, world):
        weighted = losses_N.double().cpu() * row.weight_N.double().cpu()
        for i, part in zip(members, weighted.split(list(row.counts)), strict=True):
            losses[i] = part.sum()
    if world and world.size > 1:
        summed = losses.to(base.device)  # the device on which the process group reduces gradients, too
        world.all_reduce(summed)
        losses = summed.cpu()
    return ExampleLosses(losses, weights)


def evaluated_rows(
    base: Base,
    examples: Sequence[Example],
    adapter: str | None,
    report: Report | None = None,
    task: str = "",
    world: ProcessGroup | None = None,
    unit: int = 1,
) -> Iterator[tuple[list[int], Row, Tensor]]:
    """The rows of this process as (examples, row, token losses [N]), without dropout and without gradient.

    unit: consecutive examples that stay in the same row, such as two answers to the same prompt.
    """
    units = [examples[i : i + unit] for i in range(0, len(examples), unit)]
    share = unit > 1 and shares_prefixes(base, None)
    rows = pack_rows([laid_length(one, share) for one in units], EVAL_ROW_TOKENS, base.layout)
    rows = rows[world.rank :: world.size] if world else rows
    with eval_mode(base), base.without_trained_biases() if adapter is None else nullcontext():
        for done, chosen in enumerate(rows, 1):
            members = [i * unit + k for i in chosen for k in range(unit)]
            row = row_of(base, [examples[i] for i in members], total_weight=1.0, adapter=adapter)
            yield members, row, token_losses(base, row)
            if report:
                report.progress(task, done, len(rows))


@contextmanager
def eval_mode(base: Base) -> Iterator[None]:
    """Disable dropout and gradients inside the block; the model's mode is restored afterwards."""
    training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.model.train(training)


def compare(before: ExampleLosses, after: ExampleLosses, seed: int = 0) -> Comparison:
    """Paired bootstrap (Efron 1979): resample examples with replacement, and take both losses on the same resample."""
    low, high = confidence_interval(resampled_differences(before, after, seed))
    return Comparison(before.loss, after.loss, low, high, len(before.losses))


def resampled_differences(before: ExampleLosses, after: ExampleLosses, seed: int = 0) -> Tensor:
    """after - before on each resample of the bootstrap: float64 of shape (`RESAMPLES`,)."""
    resamples = bootstrap_indices(len(before.losses), seed)
    return (after.losses - before.losses)[resamples].sum(1) / before.weights[resamples].sum(1)


def bootstrap_indices(examples: int, seed: int) -> Tensor:
    """The examples in each resample of the bootstrap: int64 of shape (`RESAMPLES`, `examples`)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(examples, (RESAMPLES, examples), generator=generator)


def confidence_interval(differences: Tensor) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of `differences`, one float64 value per resample."""
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
