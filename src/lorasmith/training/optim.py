"""The trained parameters as one flat buffer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping
from functools import partial, reduce

import torch
from torch import Tensor, nn

from lorasmith.config.training import TrainingConfig
from lorasmith.training.rounding import Rounding


class FlatParameters:
    """All trained parameters as views of one flat tensor `values`, and their gradients as views of `gradient`.

    So there is one fused AdamW update, one norm and one all-reduce. Gradients are zeroed in place, never set to None.
    `values` is in float32 at least. A parameter in half precision, as in full fine-tuning, is no view but a copy that
    is rounded at random, and its gradients are added up in float32 (mixed precision training, arXiv:1710.03740,
    section 3.1). `changes` counts the changes of `values`; the random numbers depend on it alone.
    `pieces` are the parameters, or for those in half precision their float32 values, for an optimizer that must know
    their shapes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names, self.tensors = list(parameters), list(parameters.values())
        tensors = self.tensors
        wide = reduce(torch.promote_types, (p.dtype for p in tensors), torch.float32)
        self.values = nn.Parameter(torch.cat([p.detach().flatten().to(wide) for p in tensors]))
        # the loss and the stop request follow the gradient, to be summed over the ranks in the same all-reduce
        self.reduced = self.values.new_zeros(self.values.numel() + 2)
        self.gradient, self.loss, self.stop = self.reduced[:-2], self.reduced[-2], self.reduced[-1]
        self.values.grad = self.gradient
        self.pieces: list[nn.Parameter] = []
        self.changes = 0
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []  # parameters in half precision, and their values
        for p, value, gradient in zip(
            tensors, self._split(self.values.data, tensors), self._split(self.gradient, tensors), strict=True
        ):
            piece = p
            if p.dtype == wide:
                p.data = value
            else:
                piece = nn.Parameter(value)
                self._rounded.append((p, value))
                p.register_post_accumulate_grad_hook(partial(_add_to, gradient))
            piece.grad = gradient
            self.pieces.append(piece)

    @staticmethod
    def _split(flat: Tensor, tensors: list[nn.Parameter]) -> list[Tensor]:
        pieces = flat.split([p.numel() for p in tensors])
        return [piece.view(p.shape) for piece, p in zip(pieces, tensors, strict=True)]

    def parts(self, sizes: list[int]) -> list[nn.Parameter]:
        """`values` in consecutive parts of these sizes, each with its part of the gradient."""
        parts = [nn.Parameter(piece) for piece in self.values.data.split(sizes)]
        for part, gradient in zip(parts, self.gradient.split(sizes), strict=True):
            part.grad = gradient
        return parts

    def changed(self, changes: int | None = None) -> None:
        """Let the tensors know that `values` has changed: whoever keeps a copy of one compares its version.

        They share the memory of `values`, but not its version counter. Those in half precision get the new values.
        changes: how often `values` has changed, if it was restored.
        """
        self.changes = self.changes + 1 if changes is None else changes
        torch.autograd.graph.increment_version(self.tensors)
        if self._rounded:
            rounding = Rounding(self.changes, self.values.device)
            for p, value in self._rounded:
                rounding.write(value, p.data)

    def zero(self) -> None:
        """Zero the gradient, the loss and the stop request for the next step."""
        self.reduced.zero_()


def _add_to(gradient: Tensor, p: nn.Parameter) -> None:
    """Move the gradient of a parameter to where those of its kind are added up."""
    assert p.grad is not None
    gradient.add_(p.grad)
    p.grad = None


def warmup_steps(config: TrainingConfig, steps: int) -> int:
    """The number of warmup steps of a run of `steps`. A value below 1 is a fraction of all steps, rounded down.

    So a tiny run has no warmup: the first warmup step has a learning rate of 0, and a run of one step would learn
    nothing.
    """
    # round to 6 digits first: 0.29 * 100 is 28.999999999999996 and means 29 steps
    return int(round(config.warmup * steps, 6)) if config.warmup < 1 else int(config.warmup)


def learning_rate(config: TrainingConfig, steps: int, k: int) -> float:
    """The learning rate of step k of `steps`, equal to transformers' schedules.

    A warmup from 0 to the peak, then a decay to `min_learning_rate`.
    """
    warm, peak, lowest = warmup_steps(config, steps), config.peak_learning_rate, config.min_learning_rate
    if k < warm:
        return peak * k / warm
    if config.schedule == "constant":
        return peak
    done = (k - warm) / max(1, steps - warm)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return lowest + (peak - lowest) * max(0.0, left)
