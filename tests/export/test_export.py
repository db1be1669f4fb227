"""Export to GGUF, of tiny models of every family: the file is the trained model, or it does not get its name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.adapters.folder import write_adapter
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError, ModelError, RunError
from lorasmith.export import export as exporting
from lorasmith.export.export import certificate_of, export_gguf, verify_gguf
from lorasmith.export.families import FAMILIES
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from tests.support.families import CONFIGS, stir
from tests.support.model_folders import ENDS, make_folder
from tests.support.tiny import model_folder

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


def adapter_of(base_folder: Path, folder: Path) -> Path:
    """An adapter with random weights on this base."""
    base = load_base(ModelConfig(model=str(base_folder), dtype="float32", device="cpu"))
    adapter = inject(base.model, LoraConfig(r=4), base.router)
    stir(adapter, 1)
    base.adapters["default"] = adapter
    write_adapter(base, "default", Template.of(base.tokenizer), folder, {"dtype": "float32"})
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("llama")
    return adapter_of(folder_of("llama", place / "base"), place / "adapter")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_exported_and_read_back(family, tmp_path):
    own = adapter_of(folder_of(family, tmp_path / "base"), tmp_path / "adapter")
    content = export_gguf(own, tmp_path / "model.gguf", "f32").content
    figures = content["figures"]
    assert figures["worst_tensor"] < 1e-6 and figures["tensors"] > 10 and figures["texts"] > 190
    assert ("transformers" in content["readers"]) == FAMILIES[family].read_by_transformers
    if FAMILIES[family].read_by_transformers:
        assert figures["error"] < 1e-5 and figures["agreeing"] == figures["positions"] > 20
        assert figures["equal_replies"] == figures["replies"] == 4
