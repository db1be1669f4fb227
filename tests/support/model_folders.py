"""Load a base from a folder, and change what is in the folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.config.model import ModelConfig
from lorasmith.errors import ModelError
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base


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
