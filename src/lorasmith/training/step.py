"""One optimiser step. The loss is sum of weight x token loss, the weights summing to 1 over all rows and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.model.base import Base
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Step
from lorasmith.training.distributed import World
from lorasmith.training.optim import FlatParameters


@dataclass(frozen=True)
class Log:
    """Loss and gradient norm of one step and the wish to stop, over all ranks. Reading them waits for the device."""

    loss: Tensor
    grad_norm: Tensor
    stop: Tensor

    def is_finite(self) -> bool:
        """Whether the step was a step; if not, the optimiser did not move."""
        return bool(torch.isfinite(self.loss) & torch.isfinite(self.grad_norm))


def train_step(
    base: Base,
    parameters: FlatParameters,
    optimizer: torch.optim.Optimizer,
    step: Step,
    clip: float,
    world: World,
    stop: bool = False,
) -> Log:
    """Forward, backward, one all-reduce, clip, AdamW. `step` holds this rank's rows; it may hold none."""
    parameters.zero()
    parameters.stop.fill_(stop)
    for row in step.rows:
        loss = loss_sum(base, row)
        loss.backward()
        parameters.loss += loss.detach()
    world.sum_(parameters.reduced)
    norm = parameters.gradient.norm()
    if clip:
        parameters.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
    # the fused kernel leaves everything as it is where found_inf is 1, so no host has to look first
    optimizer.found_inf = (~(torch.isfinite(parameters.loss) & torch.isfinite(norm))).float()  # type: ignore[attr-defined]
    optimizer.step()
    parameters.changed()
    return Log(parameters.loss.clone(), norm, parameters.stop.clone())
