"""Adapters of transformers 4 with an A and a B for each expert give PEFT's logits, and their own dense sums."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.errors import AdapterError
from lorasmith.lora.merge import merged_weights
from tests.support.experts import moe_base, tiny_moe
from tests.support.families import distance, logits_of

LIMIT = 1e-12  # float64
E, H, R, ALPHA = 4, 32, 4, 6
GATED = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]


def old_folder(folder: Path, family: str, targets: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
    """An adapter as PEFT wrote it with transformers 4; its tensors by the module's path in the layer."""
    generator, tensors, block = torch.Generator().manual_seed(9), dict[str, Tensor](), "mlp"
    if family == "mixtral":
        block = "block_sparse_moe"
    layers = tiny_moe(family).model.layers
    for i, layer in enumerate(layers):
        paths = {"self_attn.o_proj": layer.self_attn.o_proj.weight.shape} if "o_proj" in targets else {}
        sparse = hasattr(layer.mlp, "experts")
        width = layer.mlp.experts.down_proj.shape[-1] if sparse else layer.mlp.down_proj.in_features
        names = [name for name in targets if name in GATED]
        shapes = {name: (H, width) if GATED[name] == "down" else (width, H) for name in names}
        for name, shape in shapes.items():
            paths |= {f"{block}.experts.{e}.{name}": shape for e in range(E)} if sparse else {f"mlp.{name}": shape}
            if sparse and hasattr(layer.mlp, "shared_experts"):
                paths[f"mlp.shared_experts.{name}"] = layer.mlp.shared_experts.get_submodule(name).weight.shape
        if "gate" in targets and sparse:
            paths[f"{block}.gate"] = (E, H)
        for path, (O, I) in paths.items():
            for matrix, shape in (("A", (R, I)), ("B", (O, R))):
                key = f"base_model.model.model.layers.{i}.{path}.lora_{matrix}.weight"
                tensors[key] = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.2
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": list(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return tensors


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", ("o_proj", "w1", "w2", "w3")),
        ("mixtral", ("o_proj", "w1", "w2", "w3", "gate")),
        ("mixtral", ("o_proj", "gate")),
        ("mixtral", ("w2",)),
        ("qwen3_moe", ("o_proj", "gate_proj", "up_proj", "down_proj", "gate")),
    ],
)
def test_pairs_are_what_peft_makes_of_them(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    old_folder(tmp_path, family, targets)
    if family == "qwen3_moe":  # PEFT leaves out the dense layer
        _drop(tmp_path, "layers.0.mlp.")
    base = moe_base(family)
    AdapterFolder.read(tmp_path).load_into(base, "default")
    theirs = peft.PeftModel.from_pretrained(tiny_moe(family), tmp_path).eval()
    assert distance(logits_of(tiny_moe(family)), logits_of(theirs)) > 0.01
    assert distance(logits_of(base.model), logits_of(theirs)) < LIMIT


def _drop(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    kept = {key: t for key, t in AdapterFolder.read(folder).tensors.items() if part not in key}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", ["plain", "rslora", "patterns", "gate only"])
def test_pairs_are_their_dense_sums_beside_dense_layers_and_shared_experts(case: str, tmp_path: Path) -> None:
    names = ("gate_proj", "down_proj") if case == "gate only" else ("gate_proj", "up_proj", "down_proj")
    options: dict[str, Any] = {
        "rslora": {"use_rslora": True},
        "patterns": {"alpha_pattern": {"up_proj": 2, "experts.2.down_proj": 9}},
    }.get(case, {})
    tensors = old_folder(tmp_path, "deepseek_v3", names, **options)
    base = moe_base("deepseek_v3")
    AdapterFolder.read(tmp_path).load_into(base, "default")
    merged = merged_weights(base.model, base.adapters["default"])
    plain = dict(tiny_moe("deepseek_v3").named_parameters())

    def delta(path: str) -> Tensor:
        A, B = (tensors[f"base_model.model.{path}.lora_{m}.weight"] for m in "AB")
        alpha = next((a for key, a in options.get("alpha_pattern", {}).items() if path.endswith(key)), ALPHA)
        return B @ A * (alpha / R**0.5 if case == "rslora" else alpha / R)

    for path in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.down_proj"):
        assert torch.allclose(merged[f"{path}.weight"], plain[f"{path}.weight"] + delta(path), atol=1e-13)
    experts = "model.layers.1.mlp.experts"
    for e in range(E):
        up = [delta(f"{experts}.{e}.{name}") for name in names if GATED[name] != "down"]
        up += [torch.zeros_like(up[0])] if case == "gate only" else []
        stack = f"{experts}.gate_up_proj"
        assert torch.allclose(merged[stack][e], plain[stack][e] + torch.cat(up), atol=1e-13)
        stack = f"{experts}.down_proj"
        assert torch.allclose(merged[stack][e], plain[stack][e] + delta(f"{experts}.{e}.down_proj"), atol=1e-13)


def test_what_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    old_folder(tmp_path, "mixtral", ("o_proj", "w1", "w2", "w3"))
    _drop(tmp_path, "experts.3.w2")  # one expert without
    with pytest.raises(AdapterError, match=r"on each expert by itself \(model.layers.0.mlp.experts.0.w2\)"):
        AdapterFolder.read(tmp_path).load_into(moe_base("mixtral"), "default")
