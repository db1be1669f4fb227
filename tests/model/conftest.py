"""Families that other tests do not cover: models with unusual modules, loaded from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.tiny import tokenizer

_ENDS = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0, "vocab_size": 300}
_SMALL = _ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
_MAMBA = _ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "ctrl": _ENDS | {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},  # writes into embeddings
    "llama4_text": _SMALL  # names itself as its decoder; its router is a Linear that returns a tuple
    | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    | {"no_rope_layers": [1, 0], "moe_layers": [1], "attention_chunk_size": 16},
    "modernbert-decoder": _SMALL | {"layer_types": ["full_attention", "sliding_attention"], "cls_token_id": 0},
    "falcon_mamba": _MAMBA,  # norms without parameters
    "mamba": _MAMBA,
    "mamba2": _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},  # looks at in_proj.weight
    "rembert": _SMALL | {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 48},
    "phimoe": _SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
    "reformer": _ENDS | {"is_decoder": True, "attn_layers": ["local"], "hidden_size": 32, "attention_head_size": 8}
    | {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "num_attention_heads": 4},
}  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """A tiny base of a family, read from a folder."""

    def loaded(family: str, dtype: str = "float32") -> Base:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.1 if p.dim() > 1 else p)
        with quiet_transformers():
            model.save_pretrained(tmp_path)
        tokenizer("llama").save_pretrained(tmp_path)
        return load_base(ModelConfig(model=str(tmp_path), dtype=dtype, device="cpu"))

    return loaded
