"""Quantized matrices, and what bitsandbytes itself makes of them."""

from typing import Any

import torch
from torch import Tensor

from lorasmith.lora.quantized_weight import QuantizedWeight, quantize
from lorasmith.system.bitsandbytes import bitsandbytes

FORMATS = ("nf4", "int8")


def matrix(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(form: Any, shape: tuple[int, int] = (48, 64), dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    return quantize(matrix(shape), form, dtype)


def by_bitsandbytes(W: Tensor, form: str) -> Tensor:
    """What bitsandbytes makes of the whole matrix, in float32."""
    functional = bitsandbytes().functional
    if form == "int8":
        values, maxima, _outliers = functional.int8_vectorwise_quant(W.half())
        return values.float() * (maxima / 127)[:, None]
    packed, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    state.shape = torch.Size([1, W.numel()])  # else wrong where a row ends within a block, on a CPU
    return functional.dequantize_4bit(packed, state).view(W.shape)
