"""Frozen weights that stay in the blocks of a GGUF file: Q4_0, Q4_K, Q8_0 and the other formats of llama.cpp.

transformers has the formats' definitions in torch. A row is a whole number of blocks.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lorasmith.lora.quantized_weight import QuantizedWeight, room

_FORMATS = "transformers.integrations.gguf.dequant"
STEP = 2**17  # numbers that are converted at a time, so that what is between two operations stays in the cache


def has_formats() -> bool:
    """Whether transformers is new enough to know them (5.23)."""
    try:
        return find_spec(_FORMATS) is not None
    except ModuleNotFoundError:
        return False


@cache
def _formats() -> Any:
    return import_module(_FORMATS)


def is_known(kind: int) -> bool:
    """Whether the format with this number, as in ggml.h, has blocks that can be converted."""
    return kind in _formats().GGML_BLOCK


class GgufWeight(QuantizedWeight):
    """Blocks [O, bytes of a row] in one of the formats."""

    blocks: Tensor

    def __init__(self, blocks: Tensor, kind: int, dtype: torch.dtype) -> None:
        numbers, size = _formats().GGML_BLOCK[kind]
        super().__init__((len(blocks), blocks.shape[1] // size * numbers), dtype)
        self.kind = kind
        self.register_buffer("blocks", blocks)

    def rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """The rows in `dtype`: computed in float32, and rounded once."""
        out = room(end - start, self.shape[1], dtype, self.device)
        height = max(1, STEP // self.shape[1]) if self.device.type == "cpu" else end - start
        for into, part in zip(out.split(height), self.blocks[start:end].split(height), strict=True):
            into.copy_(self._numbers(part))
        return out

    def at(self, ids: Tensor) -> Tensor:
        """The rows with these numbers, [..., I]."""
        return self._numbers(self.blocks[ids.reshape(-1)]).to(self.dtype).view(*ids.shape, -1)

    @torch.no_grad()
    def is_from(self, W_OI: Tensor) -> bool:
        """Whether W has these values, in its own dtype."""
        if W_OI.shape != self.shape:
            return False
        bounds = self.pieces()
        return all(
            torch.equal(self.rows(low, high, W_OI.dtype), W_OI[low:high].to(self.device)) for low, high in bounds
        )

    def _numbers(self, blocks: Tensor) -> Tensor:
        numbers: Tensor = _formats().dequantize(blocks.reshape(-1), self.kind)
        return numbers.view(len(blocks), -1)
