"""Quantizing to NF4 on a CPU, with the results of bitsandbytes but several times as fast.

bitsandbytes searches the nearest of the 16 values by bisection (`torch.bucketize`), which takes nearly all of its time.
Here the interval from -1 to 1 is divided into cells of equal width, so narrow that none contains two bounds.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.system.bitsandbytes import bitsandbytes

CELLS = 64  # of the interval; the bounds are at least 0.08 apart
STEP = 2**17  # numbers at a time, so that what is between two operations stays in the processor's cache
_SMALLEST = 1e-38  # bitsandbytes' smallest maximum to divide by


class _Cells(NamedTuple):
    """For each cell: the number of bounds below it [CELLS + 1], and the bound inside it, or infinity."""

    below: Tensor
    bound: Tensor


def quantize_blocks(numbers: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """NF4 of whole blocks: two numbers a byte [N / 2, 1], and each block's maximum [N / block] in float32."""
    packed, maxima = numbers.new_empty(len(numbers) // 2, dtype=torch.uint8), []
    step = STEP // block * block
    for part, into in zip(numbers.split(step), packed.split(step // 2), strict=True):
        blocks = part.float().view(-1, block)
        maxima.append(blocks.abs().amax(dim=1))
        scaled = (blocks * (1.0 / maxima[-1].clamp(min=_SMALLEST)).view(-1, 1)).clamp_(-1, 1)
        pairs = _codes(scaled.view(-1)).view(-1, 2)
        torch.add(pairs[:, 1], pairs[:, 0], alpha=16, out=into)
    return packed.view(-1, 1), torch.cat(maxima)


def _codes(scaled: Tensor) -> Tensor:
    """How many bounds are below each number from -1 to 1: the code of the nearest value."""
    below, bound = _cells()
    cell = _cell(scaled)
    codes = below.index_select(0, cell)
    return codes.add_((scaled > bound.index_select(0, cell)).view(torch.uint8))


def _cell(scaled: Tensor) -> Tensor:
    """The cell of each number. Rounding does no harm: a larger number is never in a lower cell."""
    return (scaled * (CELLS / 2)).add_(CELLS / 2).int().clamp_(0, CELLS)  # a NaN has no cell


@cache
def _cells() -> _Cells:
    code = bitsandbytes().functional.get_4bit_type("nf4", device="cpu").float()
    bounds = (code[:-1] + code[1:]) / 2  # as bitsandbytes computes them
    cell_of_bound = _cell(bounds)
    below = (cell_of_bound < torch.arange(CELLS + 1)[:, None]).sum(1).to(torch.uint8)
    bound = torch.full((CELLS + 1,), float("inf"))
    bound[cell_of_bound] = bounds
    return _Cells(below, bound)
