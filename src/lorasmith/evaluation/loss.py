"""Held-out loss of base and adapter, and whether the difference is real: a paired bootstrap over examples."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorasmith.data.dataset.plan import rows_of
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.head import token_losses
from lorasmith.model.row import Example
from lorasmith.report import Report

RESAMPLES = 2000
FEWEST = 10  # examples below which an interval is not believed
EVAL_ROW_TOKENS = 2048


@dataclass(frozen=True)
class HeldOut:
    """Per example: the sum of its weighted token losses, and of its weights. float64, in the examples' order."""

    losses: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """Mean loss of a learned token, in nats."""
        return float(self.losses.sum() / self.weights.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Comparison:
    """Two held-out losses on the same examples, and the 95% interval of their difference."""

    before: float
    after: float
    low: float
    high: float
    examples: int

    @property
    def difference(self) -> float:
        """after - before: below zero where the second is better."""
        return self.after - self.before

    @property
    def is_real(self) -> bool:
        """Whether the interval is clear of zero; a bootstrap over fewer than `FEWEST` examples says nothing."""
        return self.examples >= FEWEST and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """The same in words."""
        if self.examples < FEWEST:
            return _("too few examples to tell; hold out more with --held-out")
        if not self.is_real:
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
            ppl_before=math.exp(self.before),
            ppl_after=math.exp(self.after),
            difference=self.difference,
            low=self.low,
            high=self.high,
            examples=self.examples,
            verdict=self.verdict,
        )


class Processes(Protocol):
    """Those that measure together; the training's World is one."""

    @property
    def rank(self) -> int:
        """This process' number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> None:
        """Add up `tensor` over all of them, in place."""


def held_out(
    base: Base,
    examples: Sequence[Example],
    adapter: str | None,
    report: Report | None = None,
    task: str = "",
    world: Processes | None = None,
) -> HeldOut:
    """The losses of `examples` under `adapter` (None: the base alone), without dropout and without gradient.

    Each process of `world` measures its rows, and all of them get the same losses: those that one would measure.
    """
    losses = torch.zeros(len(examples), dtype=torch.float64)
    weights = torch.tensor([example.weight for example in examples], dtype=torch.float64)
    rows = rows_of([e.useful_length for e in examples], EVAL_ROW_TOKENS, base.layout)
    rows = rows[world.rank :: world.size] if world else rows
    with evaluating(base):
        for done, members in enumerate(rows, 1):
            row = row_of(base, [examples[i] for i in members], total_weight=1.0, adapter=adapter)
            weighted = token_losses(base, row).double().cpu() * row.weight_N.double().cpu()
            for i, part in zip(members, weighted.split(list(row.counts)), strict=True):
                losses[i] = part.sum()
            if report:
                report.progress(task, done, len(rows))
    if world and world.size > 1:
        summed = losses.to(base.device)  # where the processes' gradients meet too
        world.sum_(summed)
        losses = summed.cpu()
    return HeldOut(losses, weights)


@contextmanager
def evaluating(base: Base) -> Iterator[None]:
    """Within it no dropout and no gradient."""
    training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.model.train(training)


def compare(before: HeldOut, after: HeldOut, seed: int = 0) -> Comparison:
    """Paired bootstrap: examples are drawn with replacement, both losses taken on the same draw (Efron 1979)."""
    draws = draws_of(len(before.losses), seed)
    low, high = interval((after.losses - before.losses)[draws].sum(1) / before.weights[draws].sum(1))
    return Comparison(before.loss, after.loss, low, high, len(before.losses))


def draws_of(examples: int, seed: int) -> Tensor:
    """(`RESAMPLES`, `examples`): which examples stand in each draw of the bootstrap."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(examples, (RESAMPLES, examples), generator=generator)


def interval(differences: Tensor) -> tuple[float, float]:
    """The middle 95% of what a difference was in the draws, which are float64."""
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
