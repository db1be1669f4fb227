"""Adapters on tiny models of the families that can be exported."""

from pathlib import Path
from typing import Any

import torch

from lorasmith.adapters.folder import write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from tests.support.families import CONFIGS, stir
from tests.support.model_folders import ENDS, make_folder

SIX = ["sliding_attention"] * 5 + ["full_attention"]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 128}
OWN: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "gemma3_text": CONFIGS["gemma3_text"]
    | {"layer_types": SIX, "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "smollm3": CONFIGS["llama"] | {"num_hidden_layers": 4},
    "mistral": CONFIGS["mistral"] | {"sliding_window": 100},
    "phi3": CONFIGS["phi3"] | {"original_max_position_embeddings": 128},
    "gpt2": CONFIGS["gpt2"] | {"n_embd": 64, "n_positions": 128},
}


def folder_of(family: str, path: Path, **changes: Any) -> Path:
    """A tiny random model of a family, with the tokens of the tiny tokenizer."""
    wide = {} if family == "gpt2" else WIDE
    return make_folder(path, family, OWN.get(family, CONFIGS.get(family, CONFIGS["llama"])) | wide | ENDS | changes)


def adapter_of(base_folder: Path, folder: Path, **options: Any) -> Path:
    """An adapter with random weights on this base. options: of `LoraConfig`; r is 4 by default."""
    base = load_base(ModelConfig(model=str(base_folder), dtype="float32", device="cpu"))
    adapter = inject(base.model, LoraConfig(**({"r": 4} | options)), base.router)
    stir(adapter, 1)
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            if ".lora_B." in key:
                parameter *= 0.2  # as a training would: the weights change by some percent
    base.adapters["default"] = adapter
    write_adapter(base, "default", Template.of(base.tokenizer), folder, {"dtype": "float32"})
    return folder
