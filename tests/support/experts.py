"""Tiny random models with experts in one tensor, in the layouts that transformers has."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorasmith.model.base import Base
from tests.support.families import WORDS
from tests.support.model_folders import ENDS, make_folder

_SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": _SMALL | {"num_local_experts": 4},
    # the first layer is dense, with names that PEFT takes for those of experts
    "qwen3_moe": _SMALL | {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "gpt_oss": _SMALL | {"num_local_experts": 4, "sliding_window": 8},  # W_EIO with biases, gate and up interleaved
    # dense first layer and shared experts
    "deepseek_v3": _SMALL | {
        "n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "num_key_value_heads": 4, "head_dim": 4, "n_shared_experts": 1,
    },
    # one projection a module, whose input is sorted by expert
    "jetmoe": _SMALL | {"num_local_experts": 4, "kv_channels": 8},
}  # fmt: skip
LAYOUTS = tuple(EXPERTS)


@functools.cache
def _original(family: str, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS[family]))
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    return model.to(dtype).requires_grad_(False).eval()


def tiny_moe(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A fresh copy of the family's model: the same weights each time, frozen, in eval mode."""
    return copy.deepcopy(_original(family, dtype))


def moe_base(family: str, dtype: torch.dtype = torch.float64) -> Base:
    """A Base on `tiny_moe(family)` that nothing was probed of."""
    return Base(tiny_moe(family, dtype), None, family, Path(), dtype, torch.device("cpu"))  # type: ignore[arg-type]


def moe_folder(folder: Path, family: str) -> Path:
    """A folder with such a model and the tiny tokenizer."""
    return make_folder(folder, family, EXPERTS[family] | ENDS | {"max_position_embeddings": 128})
