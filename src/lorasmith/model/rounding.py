"""Decide whether two results of a model differ by rounding alone.

A fixed tolerance cannot tell that in bfloat16: some models multiply rounding errors until a third of a gradient is
noise, and a mixture of experts may send a token to another expert. So where the difference exceeds what is usual, the
model's own noise is measured: how far its results move if the output of every linear layer gets a random error of one
rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasmith.model.base import Base

# the usual largest relative difference by rounding between two correct computations
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
RUNS, MARGIN = 4, 2.0  # the noise is the largest of so many runs; a correct difference may be so many times as large
FARTHEST = 0.5  # a larger difference is never rounding


def differ_by_rounding(
    base: Base,
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    again: Callable[[], Sequence[Tensor]],
    farthest: float = FARTHEST,
) -> bool:
    """Whether `results` equal `expected` up to rounding: each by its norm. False for NaN and infinity.

    again: computes `expected` once more, with plain linear layers; called only if the difference is unusual.
    farthest: a larger difference is never rounding.
    """
    far = _distances(results, expected)
    tolerance = TOLERANCE[base.dtype]
    if all(distance <= tolerance for distance in far):
        return True
    if not all(distance <= farthest for distance in far):
        return False
    noise = [tolerance / MARGIN] * len(far)
    for seed in range(RUNS):
        with rounding_errors(base.model, seed):
            noise = list(map(max, noise, _distances(again(), expected)))
    return all(distance <= MARGIN * own for distance, own in zip(far, noise, strict=True))


@contextmanager
def rounding_errors(model: nn.Module, seed: int) -> Iterator[None]:
    """Add a random error of up to one rounding to the output of each linear layer inside the block."""
    generator = torch.Generator().manual_seed(seed)

    def hook(_module: nn.Module, _inputs: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output  # the routers of some mixtures of experts return a tuple
        error = (torch.rand(output.shape, generator=generator) * 2 - 1).to(output.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        return output + (output.detach().to(wide) * error * torch.finfo(output.dtype).eps).to(output.dtype)

    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [module.register_forward_hook(hook) for module in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distances(results: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """The norm of each difference, relative to that of what is expected."""
    pairs = zip(results, expected, strict=True)
    return [float((a - b).float().norm() / b.float().norm().clamp_min(1e-30)) for a, b in pairs]
