"""Adapters of experts that PEFT 0.17 and 0.18 wrote, against their formula, W[e] += (B A)^T in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.early_experts import as_stored_now, stored_transposed
from lorasmith.lora.merge import merged_weights
from tests.support.experts import moe_base

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
R, ALPHA = 3, 6
pytestmark = pytest.mark.usefixtures("exact")


def early_folder(folder: Path, family: str, **options: Any) -> dict[str, Tensor]:
    """Write an adapter as PEFT 0.18 did, with random values; the changes of the weights, by its formula."""
    base, tensors, changes = moe_base(family), dict[str, Tensor](), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(3)
    for path, module in base.model.named_modules():
        for prefix, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")) if path.endswith("experts") else ():
            E, first, second = module.get_parameter(name).shape
            A = torch.randn(E * R, first, generator=generator, dtype=torch.float64)
            B = torch.randn(second, R * E, generator=generator, dtype=torch.float64)
            key = f"base_model.model.{path}.{prefix}lora_"
            tensors |= {f"{key}A.weight": A, f"{key}B.weight": B}
            changes[f"{path}.{name}"] = (ALPHA / R) * torch.einsum("ore,eri->eio", B.view(-1, R, E), A.view(E, R, -1))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": [], "target_parameters": [DOWN, UP],
        "base_model_name_or_path": "the/base", "peft_version": "0.18.1",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return changes


def furthest(folder: Path, family: str, changes: dict[str, Tensor]) -> float:
    base = moe_base(family)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    AdapterFolder.read(folder).load_into(base, "default")
    merged = merged_weights(base.model, base.adapters["default"])
    assert merged.keys() == changes.keys()
    return max(float((weight - before[name] - changes[name]).abs().max()) for name, weight in merged.items())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"peft_version": None}, {"target_parameters": [UP, DOWN]}])
def test_it_changes_the_weights_as_it_did_then(tmp_path, family, options):
    changes = early_folder(tmp_path / "early", family, **options)
    assert furthest(tmp_path / "early", family, changes) < 1e-12


@pytest.mark.parametrize(
    ("version", "is_ours", "expected"),
    [
        ("0.17.0", False, True), ("0.18.2.dev0@abc", True, True), ("0.19.0", False, False), ("0.21.2", False, False),
        ("0.19.0.dev0", False, None), (None, False, None), (None, True, False), ("", True, False),
        ("1.0", False, False),
    ],
)  # fmt: skip
def test_the_version_tells_how_they_are_stored(version, is_ours, expected):
    assert stored_transposed({"peft_version": version}, is_ours) is expected


def square(folder: Path) -> tuple[Any, LoraConfig, dict[str, Tensor]]:
    """A base whose down_proj is square, and an early adapter of it."""
    early_folder(folder, "mixtral", target_parameters=[DOWN])
    base = moe_base("mixtral")
    for path, module in base.model.named_modules():
        if path.endswith("experts"):
            module.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 32, dtype=torch.float64))
    tensors = {key: t for key, t in load_file(folder / "adapter_model.safetensors").items() if "base_layer" not in key}
    tensors = {key: t[:, :32] if "lora_A" in key else t for key, t in tensors.items()}
    return base, LoraConfig(r=R, target_modules=(), target_parameters=(DOWN,)), tensors


def test_of_square_ones_only_the_version_tells(tmp_path):
    base, config, tensors = square(tmp_path / "early")
    key = "base_model.model.model.layers.1.mlp.experts.lora_"
    A, B = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
    now = as_stored_now(base.model, config, tensors, True)
    for e in range(4):
        then = (B[:, e::4] @ A[e * R : e * R + R]).t()
        found = now[f"{key}B.weight"][:, e::4] @ now[f"{key}A.weight"][e * R : e * R + R]
        assert torch.allclose(found, then, atol=1e-12)
    assert torch.equal(as_stored_now(base.model, config, tensors, False)[f"{key}A.weight"], A)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts\.down_proj is square, and adapter_config\.json"):
        as_stored_now(base.model, config, tensors, None)


def test_shapes_of_neither_kind_are_refused_as_they_are(tmp_path):
    early_folder(tmp_path / "early", "mixtral")
    file = tmp_path / "early" / "adapter_model.safetensors"
    save_file({key: t[:-1] if "lora_A" in key else t for key, t in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="the shape is"):
        AdapterFolder.read(tmp_path / "early").load_into(moe_base("mixtral"), "default")
