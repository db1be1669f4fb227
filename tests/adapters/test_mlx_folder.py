"""Adapters of mlx-lm in PEFT's form: the same change of the weights, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.adapters.mlx_folder import write_as_peft
from lorasmith.errors import AdapterError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors")
    whole = {"fine_tune_type": "lora", "model": "org/base", "lora_parameters": {"rank": 2, "scale": 20.0}} | config
    (path / "adapter_config.json").write_text(json.dumps(whole))
    return path


def matrices(path: str, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_a": torch.randn(8, rank), f"{path}.lora_b": torch.randn(rank, 6)}


def as_peft(source: Path, target: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    target.mkdir()
    write_as_peft(source, target)
    return json.loads((target / "adapter_config.json").read_text()), load_file(target / "adapter_model.safetensors")


def test_matrices_are_transposed_and_the_scale_is_kept(tmp_path):
    given = matrices(Q)
    config, found = as_peft(folder(tmp_path / "mlx", given), tmp_path / "peft")
    a, b = (found[f"base_model.model.{Q}.lora_{part}.weight"] for part in "AB")
    assert torch.equal(a, given[f"{Q}.lora_a"].t())
    assert torch.equal(b, given[f"{Q}.lora_b"].t())
    assert config["lora_alpha"] / config["r"] == 20.0
    assert (config["target_modules"], config["base_model_name_or_path"]) == ([Q], "org/base")
    assert config["use_dora"] is False


def test_ranks_of_single_layers(tmp_path):
    config, _found = as_peft(folder(tmp_path / "mlx", matrices(Q, 4) | matrices(V, 1)), tmp_path / "peft")
    (pattern,) = config["rank_pattern"]
    assert (config["r"], config["rank_pattern"][pattern], config["alpha_pattern"][pattern]) == (4, 1, 20.0)
    assert pattern == "^model\\.layers\\.0\\.self_attn\\.v_proj"


def test_dora_has_its_magnitudes(tmp_path):
    given = matrices(Q) | {f"{Q}.m": torch.rand(6)}
    config, found = as_peft(folder(tmp_path / "mlx", given, fine_tune_type="dora"), tmp_path / "peft")
    assert config["use_dora"] is True
    assert torch.equal(found[f"base_model.model.{Q}.lora_magnitude_vector"], given[f"{Q}.m"])


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (matrices(Q), {"fine_tune_type": "full"}, "fine_tune_type is full: these are trained weights of the model"),
        (matrices(Q), {"lora_parameters": {"rank": 2}}, r"lora_parameters\.scale must be a number, but is None"),
        ({f"{Q}.lora_a": torch.randn(4, 8, 2)}, {}, r"lora_a of shape \(4, 8, 2\) is no matrix of a linear layer"),
        ({f"{Q}.weight": torch.randn(4, 8)}, {}, r"q_proj\.weight of shape \(4, 8\) is no matrix"),
        ({}, {}, "there is no lora_a in it"),
    ],
)
def test_what_is_not_low_rank_of_linear_layers_is_refused(tensors, config, words, tmp_path):
    (tmp_path / "peft").mkdir()
    with pytest.raises(AdapterError, match=words):
        write_as_peft(folder(tmp_path / "mlx", tensors, **config), tmp_path / "peft")
    assert not any((tmp_path / "peft").iterdir())


def test_damaged_weights_are_an_error(tmp_path):
    source = folder(tmp_path / "mlx", matrices(Q))
    (source / "adapters.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "peft").mkdir()
    with pytest.raises(AdapterError, match=r"adapters\.safetensors: cannot be read"):
        write_as_peft(source, tmp_path / "peft")
