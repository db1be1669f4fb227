"""Stochastic rounding of float32 values to half precision: up or down at random, right on average.

A weight in bfloat16 has 8 significant bits, so a step of a small learning rate seldom reaches the next number. Rounded
to the nearest, the weight that the model computes with stays where it is; rounded at random, its expected value is that
in float32 (arXiv:1502.02551, section 3.1; arXiv:2010.06192).
"""

import torch
from torch import Tensor

CHUNK = 2**15  # values at a time: temporary tensors stay in the cache, and threads need not wait for each other
DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # low bits of a float32 that the dtype does not have


class Rounding:
    """The roundings of one step. The random numbers depend on `seed` and on the order of the calls alone."""

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(-(2**31), 2**31, (CHUNK,), dtype=torch.int32, generator=generator)
        self._drawn = drawn.to(device)
        self._generator = generator

    @torch.no_grad()
    def write(self, values: Tensor, rounded: Tensor) -> None:
        """Write `values`, contiguous float32, to `rounded`, a contiguous tensor of the same shape in half precision.

        Each becomes one of its two neighbors in that dtype, the nearer one with the higher probability. A value that
        has no rounding error is kept as it is. In float16, those below its normal range are rounded to the nearest.
        """
        bits = DROPPED[rounded.dtype]
        for value, out in zip(values.view(-1).split(CHUNK), rounded.view(-1).split(CHUNK), strict=True):
            # other noise for each chunk at little cost: the upper bits of the products with a random odd number
            factor = 2 * int(torch.randint(2**30, (), generator=self._generator)) + 1
            noise = (self._drawn[: value.numel()] * factor).bitwise_right_shift_(32 - bits)
            noise.bitwise_and_((1 << bits) - 1).add_(value.view(torch.int32)).bitwise_and_(-1 << bits)
            out.copy_(noise.view(torch.float32))
