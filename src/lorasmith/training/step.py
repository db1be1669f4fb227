"""One optimizer step. The loss is the sum of weight x token loss; the weights sum to 1 over all rows and ranks.

A step with objectives minimizes these instead; they add up to its loss over all rows and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from lorasmith.model.base import Base
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Objective, Row, Step, join
from lorasmith.training.distributed import World
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import Optimizer

MORE_PADDING = 1.1  # tokens of padded rows computed together, as a multiple of what they have apart


@dataclass(frozen=True)
class Log:
    """The loss, gradient norm and stop request of one step: scalar tensors, the same on all ranks.

    `stop` counts the ranks that asked to stop. Reading a value waits for the device. metrics: of the objectives.
    """

    loss: Tensor
    grad_norm: Tensor
    stop: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite; if not, the optimizer has not changed the parameters."""
        return bool(torch.isfinite(self.loss) & torch.isfinite(self.grad_norm))


def train_step(
    base: Base,
    parameters: FlatParameters,
    optimizer: Optimizer,
    step: Step,
    clip: float,
    world: World,
    stop: bool = False,
) -> Log:
    """Forward, backward, one all-reduce, gradient clipping and the optimizer.

    step: the rows of this rank, possibly none.
    clip: maximum norm of the gradient; 0 disables clipping.
    stop: this rank asks all ranks to stop after the step.
    """
    parameters.zero()
    parameters.stop.fill_(stop)
    for row, objective in zip_longest(step.rows, step.objectives):
        loss = loss_sum(base, row, objective)
        if loss.requires_grad:  # not if an aLoRA is active nowhere in the row
            loss.backward()
        parameters.loss += loss.detach()
    return _update(parameters, optimizer, clip, world)


@dataclass(frozen=True)
class Learner:
    """An adapter in a step that trains several at once; `clip` as in `train_step`."""

    parameters: FlatParameters
    optimizer: Optimizer
    step: Step
    clip: float


def train_step_together(
    base: Base, learners: Sequence[Learner], row_tokens: int, world: World, stop: bool = False
) -> list[Log]:
    """One step of each learner, with the rows of several in one forward and backward pass.

    Equal to a `train_step` of each, up to rounding: a label's gradient reaches the adapter of its own tokens only.
    row_tokens: the most tokens of a pass, unless a single row has more.
    """
    for one in learners:
        one.parameters.zero()
        one.parameters.stop.fill_(stop)
    rows = [(one, row) for i in range(max(len(one.step.rows) for one in learners))
            for one in learners for row in one.step.rows[i : i + 1]]  # fmt: skip
    for group in groups_that_fit([row for _one, row in rows], row_tokens, base.layout == "padded"):
        row = join([rows[i][1] for i in group])
        kept: list[Tensor] = []
        loss = loss_sum(base, row, keeping(row, kept))
        if loss.requires_grad:
            loss.backward()
        for i, losses in zip(group, kept[0].split([len(rows[i][1].at_N) for i in group]), strict=True):
            rows[i][0].parameters.loss += losses.sum()
    return [_update(one.parameters, one.optimizer, one.clip, world) for one in learners]


def keeping(row: Row, kept: list[Tensor]) -> Objective:
    """The usual loss of a row, as an objective that keeps weight x loss of each label in `kept`."""

    def weighted(losses_N: Tensor) -> tuple[Tensor, Tensor]:
        weight_N = row.weight_N.to(losses_N.dtype)
        kept.append(losses_N * weight_N)
        return losses_N @ weight_N, weight_N

    return weighted


def groups_that_fit(rows: Sequence[Row], row_tokens: int, padded: bool) -> list[list[int]]:
    """Which rows to compute in one pass, by first fit: at most `row_tokens` tokens, padding included.

    Padded rows are put together only if that adds little padding.
    """
    groups: list[list[int]] = []
    for i, row in enumerate(rows):
        for group in groups:
            sizes = [_size(rows[k], padded) for k in (*group, i)]
            spans = [span.length for k in (*group, i) for span in rows[k].spans]
            together = max(spans) * len(spans) if padded and spans else sum(sizes)
            if together <= min(row_tokens, MORE_PADDING * sum(sizes)):
                group.append(i)
                break
        else:
            groups += [[i]] if row.tokens else []
    return groups


def _size(row: Row, padded: bool) -> int:
    return max((span.length for span in row.spans), default=0) * len(row.spans) if padded else row.tokens


def _update(parameters: FlatParameters, optimizer: Optimizer, clip: float, world: World) -> Log:
    """All-reduce, gradient clipping and the optimizer."""
    world.all_reduce(parameters.reduced)
    norm = parameters.gradient.norm()
    if clip:
        parameters.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step(torch.isfinite(parameters.loss) & torch.isfinite(norm))
    return Log(parameters.loss.clone(), norm, parameters.stop.clone())
