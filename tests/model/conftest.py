"""Families that other tests do not cover: models with unusual modules, loaded from a folder."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from tests.support.model_folders import ENDS as _ENDS
from tests.support.model_folders import make_folder

_SMALL = _ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
_TEXT = _SMALL | {"num_key_value_heads": 2}
_HYBRID = _TEXT | {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 4}
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
    "bamba": _HYBRID,
    "falcon_h1": _HYBRID | {"mamba_d_ssm": 64},
    "gemma3": {"text_config": _TEXT | {"head_dim": 8, "sliding_window": 8}, "vision_config": _VISION}
    | {"mm_tokens_per_image": 4, "boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3},
    "granitemoehybrid": _HYBRID | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "nemotron_h": _HYBRID | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8},
    "zamba2": _HYBRID | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_ngroups": 1},
    "rembert": _SMALL | {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 48},
    "phimoe": _SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
    "bert": _SMALL,  # an encoder, unless is_decoder is set
    "prophetnet": _ENDS | {"hidden_size": 32, "is_decoder": True}
    | {f"num_{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "got_ocr2": {"text_config": _TEXT | {"model_type": "qwen2"}, "vision_config": _VISION
                 | {"num_hidden_layers": 1, "mlp_dim": 24, "output_channels": 8, "global_attn_indexes": [0]}},
    "reformer": _ENDS | {"is_decoder": True, "attn_layers": ["local"], "hidden_size": 32, "attention_head_size": 8}
    | {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "num_attention_heads": 4},
}  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """A tiny base of a family, read from a folder."""

    def loaded(family: str, dtype: str = "float32") -> Base:
        folder = make_folder(Path(mkdtemp(dir=tmp_path)), family, CONFIGS[family])
        return load_base(ModelConfig(model=str(folder), dtype=dtype, device="cpu"))

    return loaded
