"""Quantized matrices, and what bitsandbytes itself makes of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.lora.quantized_weight import QuantizedWeight, quantize
from lorasmith.system.bitsandbytes import bitsandbytes
from tests.support.families import CONFIGS
from tests.support.tiny import tokenizer

FORMATS = ("nf4", "int8")
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 2}


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


def wide_folder(folder: Path) -> Path:
    """A llama whose rows are whole blocks of 64: bitsandbytes 0.50 computes others wrongly on a CPU."""
    own = {"vocab_size": len(tokenizer("llama")), "tie_word_embeddings": True, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIGS["llama"] | WIDE | own))
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    tokenizer("llama").save_pretrained(folder)
    return folder
