"""Preference loss, accuracy and reward margin on held-out answers, with paired bootstrap intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.evaluation.loss import (
    Comparison,
    ExampleLosses,
    ProcessGroup,
    bootstrap_indices,
    confidence_interval,
    evaluated_rows,
)
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.preference import AnswerSums, PreferenceLoss, answer_sums
from lorasmith.model.row import Example
from lorasmith.report import Report


@dataclass(frozen=True)
class PreferenceLosses(ExampleLosses):
    """The loss of each unit (a pair, or an answer with kto), with weight 1, and what it is made of.

    right_U: whether the chosen answer has the larger reward, and with kto, whether the answer is on its side of the
    reference point. reward_K, desirable_K: of each answer, `answers` of them in a unit. All float64.
    """

    right_U: Tensor
    reward_K: Tensor
    desirable_K: Tensor

    @property
    def scores(self) -> dict[str, float]:
        """Accuracy and mean margin of the rewards, for metrics.jsonl; no margin if all answers are of one kind."""
        whole = torch.arange(len(self.losses))[None]
        margin = float(self._margin(whole))
        found = {"held_out_accuracy": float(self._accuracy(whole))}
        return found if math.isnan(margin) else found | {"held_out_margin": margin}

    def _accuracy(self, resamples_RU: Tensor) -> Tensor:
        return self.right_U[resamples_RU].mean(1)

    def _margin(self, resamples_RU: Tensor) -> Tensor:
        """The mean reward of good answers above that of bad ones, in each resample; NaN if it has none of a kind."""
        units = len(self.losses)
        good_U, bad_U = (
            torch.stack([self.reward_K * one, one]).reshape(2, units, -1).sum(2)
            for one in (self.desirable_K, 1 - self.desirable_K)
        )
        good_R, bad_R = (part[:, resamples_RU].sum(2) for part in (good_U, bad_U))
        return good_R[0] / good_R[1] - bad_R[0] / bad_R[1]


@dataclass(frozen=True)
class PreferenceComparison(Comparison):
    """A comparison of preference losses, with the accuracy and the margin after the training and their intervals."""

    accuracy: float
    accuracy_interval: tuple[float, float]
    margin: float
    margin_interval: tuple[float, float]

    def __str__(self) -> str:
        text = _(
            "held-out preference loss {before:.4f} -> {after:.4f}; difference {difference:+.4f}, 95% confidence "
            "interval [{low:+.4f}, {high:+.4f}] on {examples} held-out rows: {verdict}. Accuracy {accuracy:.1%} "
            "[{worst:.1%}, {best:.1%}]",
            before=self.before,
            after=self.after,
            difference=self.difference,
            low=self.low,
            high=self.high,
            examples=self.examples,
            verdict=self.verdict,
            accuracy=self.accuracy,
            worst=self.accuracy_interval[0],
            best=self.accuracy_interval[1],
        )
        if math.isnan(self.margin):
            return text
        least, most = self.margin_interval
        return text + _(
            ", reward margin {margin:+.4f} [{least:+.4f}, {most:+.4f}]", margin=self.margin, least=least, most=most
        )


def evaluate_sums(
    base: Base,
    examples: Sequence[Example],
    unit: int,
    adapter: str | None,
    report: Report | None = None,
    task: str = "",
    world: ProcessGroup | None = None,
) -> AnswerSums:
    """The sums of each answer under `adapter`, float64, without dropout and without gradient.

    unit: answers that lie in the same row, so that their prompt is computed once.
    """
    found = torch.zeros(4, len(examples), dtype=torch.float64)
    for members, row, losses_N in evaluated_rows(base, examples, adapter, report, task, world, unit):
        found[:, members] = torch.stack(answer_sums(losses_N.to(row.weight_N.dtype), row)).double().cpu()
    if world and world.size > 1:
        summed = found.to(base.device)
        world.all_reduce(summed)
        found = summed.cpu()
    return AnswerSums(*found)


def preference_losses(
    loss: PreferenceLoss, examples: Sequence[Example], sums: AnswerSums, reference_K: Tensor | None, kl: Tensor | None
) -> PreferenceLosses:
    """The losses of `examples`, whose mean is that of a training step with all of them.

    reference_K: log-probabilities in the model as it stood at the start. kl: as in `PreferenceLoss.values`.
    """
    desirable_K = desirable(examples)
    values = loss.values(sums, reference_K, desirable_K, kl)
    losses_U = values.loss_U
    if loss.nll_weight:
        nll_U, tokens_U = loss.nll(sums)
        losses_U = losses_U + loss.nll_weight * nll_U * len(nll_U) / tokens_U.sum()
    return PreferenceLosses(losses_U, torch.ones_like(losses_U), values.right_U.double(), values.reward_K, desirable_K)


def desirable(examples: Sequence[Example]) -> Tensor:
    """1 for a good answer, 0 for a bad one: float64 of shape (answers,)."""
    return torch.tensor([float(bool(example.desirable)) for example in examples], dtype=torch.float64)


def compare_preferences(before: PreferenceLosses, after: PreferenceLosses, seed: int = 0) -> PreferenceComparison:
    """Paired bootstrap over units, as in `compare`."""
    resamples_RU = bootstrap_indices(len(before.losses), seed)
    difference_R = (after.losses - before.losses)[resamples_RU].mean(1)
    low, high = confidence_interval(difference_R)
    margin_R = after._margin(resamples_RU)
    margin_R = margin_R[torch.isfinite(margin_R)]  # of a resample with no bad answer there is no margin
    scores = after.scores
    return PreferenceComparison(
        before.loss, after.loss, low, high, len(before.losses),
        scores["held_out_accuracy"], confidence_interval(after._accuracy(resamples_RU)),
        scores.get("held_out_margin", math.nan),
        confidence_interval(margin_R) if len(margin_R) else (math.nan, math.nan),
    )  # fmt: skip
