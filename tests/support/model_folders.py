"""Load a base from a folder, and change what is in the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.config.model import ModelConfig
from lorasmith.errors import ModelError
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.tiny import tokenizer

ENDS = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0, "vocab_size": 300}  # of the tiny tokenizer


def make_folder(folder: Path, family: str, config: dict[str, Any]) -> Path:
    """A folder with a tiny random model of a family, the same each time, and the tiny tokenizer."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 if p.dim() > 1 else p)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer("llama").save_pretrained(folder)
    return folder


def load(folder: Path, **options: object) -> Base:
    return load_base(ModelConfig(**({"model": str(folder), "dtype": "float32", "device": "cpu"} | options)))


def said(folder: Path, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    (problem,) = caught.value.problems
    return problem.replace(str(folder), "MODEL")


def configure(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
