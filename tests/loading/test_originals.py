"""Every parameter is given once, under its name in the loaded model and with its value in the file."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.config.model import ModelConfig
from lorasmith.errors import ModelError
from lorasmith.loading.load import load_base
from lorasmith.loading.originals import each_original
from tests.support.experts import moe_folder
from tests.support.tiny import model_folder


def given(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def use(name: str, value: Tensor) -> None:
        assert name not in found
        assert value.dtype == torch.float32
        found[name] = value

    each_original(folder, False, use)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2", "gpt_neox"])
def test_names_and_values_are_those_of_the_loaded_model(family: str) -> None:
    folder = model_folder(family)
    wanted = dict(load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu")).model.named_parameters())
    found = given(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], p) for name, p in wanted.items())


def test_experts_that_are_many_tensors_in_the_file(tmp_path: Path) -> None:
    folder = moe_folder(tmp_path / "model", "mixtral")
    wanted = dict(load_base(ModelConfig(model=str(folder), dtype="float32", device="cpu")).model.named_parameters())
    found = given(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], p) for name, p in wanted.items())


def test_one_is_in_memory_at_a_time() -> None:
    folder, seen = model_folder("llama"), list[weakref.ref[Tensor]]()

    def use(_name: str, value: Tensor) -> None:
        assert not any(ref() is not None for ref in seen[:-1])  # the last one is still a local variable of the caller
        seen.append(weakref.ref(value))

    each_original(folder, False, use)
    assert len(seen) > 10


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = moe_folder(tmp_path / "model", "mixtral")
    (folder / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="model"):
        given(folder)
