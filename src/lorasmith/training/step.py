"""One optimizer step. The loss is the sum of weight x token loss; the weights sum to 1 over all rows and ranks.

A step with objectives minimizes these instead; they add up to its loss over all rows and ranks.
"""

from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from lorasmith.model.base import Base
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Step
from lorasmith.training.distributed import World
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import Optimizer


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
    world.all_reduce(parameters.reduced)
    norm = parameters.gradient.norm()
    if clip:
        parameters.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step(torch.isfinite(parameters.loss) & torch.isfinite(norm))
    return Log(parameters.loss.clone(), norm, parameters.stop.clone())
