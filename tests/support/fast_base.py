"""Tiny models with their fast parts, linked and switched as a training has them."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import Adapter, inject
from lorasmith.model.base import Base
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.verify import enable_fast_parts, use_fast_parts
from tests.support.families import _LLAMA, CONFIGS, stir, tiny_base

# every other layer without rotary embedding
SMOLLM3 = {"smollm3": _LLAMA | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}}
FAST = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "granite", "smollm3")
IDS = [3 + 7 * i % 96 for i in range(24)]
PLAIN: frozenset[str] = frozenset()


def plain_base(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Base, Adapter]:
    """A base as `load_base` and `inject` leave it, with a trained-looking adapter; all parts are plain."""
    with patch.dict(CONFIGS, SMOLLM3):
        base = tiny_base(family, dtype)
    recognize_modules(base.model)
    adapter = base.adapters["default"] = inject(base.model, LoraConfig(**({"r": 4} | options)), base.router)
    stir(adapter)
    use_fast_parts(base, PLAIN)
    return base, adapter


def fast_base(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Base, Adapter]:
    """The same after `enable_fast_parts`."""
    base, adapter = plain_base(family, dtype, **options)
    enable_fast_parts(base, "default", IDS)
    return base, adapter


def output_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_(True)
    y = module(leaf)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad(y, leaf, direction)[0]
