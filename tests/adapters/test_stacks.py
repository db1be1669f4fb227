"""Combining adapters of experts, against dense matrices in float64 and in PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.adapters.combine import Combination, combine_adapters
from lorasmith.adapters.folder import AdapterFolder
from lorasmith.adapters.stacks import expert_factors, is_expert, places, stacked
from lorasmith.config.combine import CombineConfig
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject
from lorasmith.lora.merge import merged_weights
from lorasmith.lora.parameters import ParameterUpdate
from lorasmith.lora.sparsify import sparsifier
from tests.support.experts import LAYOUTS, moe_base, tiny_moe
from tests.support.families import distance, logits_of, stir

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def adapter_of(folder: Path, seed: int, family: str, **options: Any) -> Path:
    base = moe_base(family, torch.float32)
    adapter = inject(base.model, LoraConfig(**({"r": 4, "lora_alpha": 6} | options)), base.router)
    stir(adapter, seed)
    save_adapter(adapter, base.model, folder, "the/base")
    return edited(folder, peft_version="0.21.2")  # without lorasmith.json it is a folder of another program


def edited(folder: Path, **options: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return folder


def changes(family: str, folder: Path) -> dict[str, Tensor]:
    """The change of each weight, dense and in float64."""
    base = moe_base(family)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    AdapterFolder.read(folder).load_into(base, "default")
    merged = merged_weights(base.model, base.adapters["default"])
    return {name: weight - before[name] for name, weight in merged.items()}


def combined(adapters: list[tuple[Path, float]], output: Path, **options: Any) -> Combination:
    return combine_adapters(adapters, output, CombineConfig(**options))


def sum_of(family: str, adapters: list[tuple[Path, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in adapters:
        for name, change in changes(family, folder).items():
            total[name] = total.get(name, torch.zeros(())) + weight * change
    return total


def furthest(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert ours.keys() == wanted.keys()
    assert min(float(change.norm()) for change in wanted.values()) > 0.1
    return max(distance(ours[name], wanted[name]) for name in wanted)


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *((family, "cat", {}, {"r": 6, "use_rslora": True}) for family in LAYOUTS),
    ("gpt_oss", "svd", {}, {"r": 6, "use_rslora": True}),
    ("mixtral", "cat", {"target_modules": (), "target_parameters": (UP,)},
     {"target_modules": (), "target_parameters": (DOWN,), "r": 2}),
    ("qwen3_moe", "cat", {"target_modules": ("o_proj",), "target_parameters": (DOWN,)},
     {"rank_pattern": {UP: 3}, "alpha_pattern": {DOWN: 9}}),
    ("mixtral", "svd", {"target_modules": ("o_proj",)}, {"last_layers": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "first", "second"), CASES)
def test_the_sum_is_that_of_the_dense_weights_and_peft_reads_it(tmp_path, family, method, first, second):
    adapters = [
        (adapter_of(tmp_path / "one", 1, family, **first), 0.7),
        (adapter_of(tmp_path / "two", 2, family, **second), -0.4),
    ]
    result = combined(adapters, tmp_path / "out", method=method, rank=20 if method == "svd" else None)
    assert furthest(changes(family, tmp_path / "out"), sum_of(family, adapters)) < 1e-6
    assert result.error < 1e-6
    base = moe_base(family)
    AdapterFolder.read(tmp_path / "out").load_into(base, "default")
    theirs = peft.PeftModel.from_pretrained(tiny_moe(family), tmp_path / "out").eval()
    assert distance(logits_of(theirs), logits_of(base.model)) < 1e-6


def test_experts_keep_a_rank_of_their_own(tmp_path):
    adapters = [(adapter_of(tmp_path / name, i, "mixtral", r=8), 0.5) for i, name in enumerate(("one", "two"))]
    combined(adapters, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (16, {UP: 8, DOWN: 8}, {UP: 8, DOWN: 8})
    assert config["target_parameters"] == [DOWN, UP]
    assert {len(t) for key, t in tensors.items() if "experts" in key and "lora_A" in key} == {4 * 8}


@pytest.mark.parametrize("method", ["linear", "ties", "ties_svd", "magnitude_prune_svd"])
def test_the_other_methods_are_applied_to_each_expert(tmp_path, method):
    """Against the rule on this expert's own matrices, without the code that splits and stacks them."""
    options: dict[str, Any] = {"target_modules": (), "target_parameters": (DOWN,)}
    adapters = [
        (adapter_of(tmp_path / name, i, "mixtral", **options), 0.5 + i) for i, name in enumerate(("one", "two"))
    ]
    density = None if method == "linear" else 0.4
    combined(adapters, tmp_path / "out", method=method, density=density)
    rule = sparsifier(method.removesuffix("_svd"), density, "total", None)
    key = "base_model.model.model.layers.1.mlp.experts.lora_"
    files = [load_file(folder / "adapter_model.safetensors") for folder, _weight in adapters]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    r = found[f"{key}A.weight"].shape[0] // 4
    for e in range(4):
        pairs = [(file[f"{key}A.weight"][e * 4 : e * 4 + 4], file[f"{key}B.weight"][:, e::4]) for file in files]
        weights = [0.5 * 1.5, 1.5 * 1.5]  # lora_alpha 6, r 4
        if method.endswith("_svd"):
            whole = rule([1.5 * B @ A for A, B in pairs], [0.5, 1.5]).double()
            U, S, Vh = torch.linalg.svd(whole)
            wanted = U[:, :4] * S[:4] @ Vh[:4]
        else:
            roots = [weight**0.5 for weight in weights]
            wanted = rule([B for _A, B in pairs], roots) @ rule([A for A, _B in pairs], roots)
        ours = found[f"{key}B.weight"][:, e::4] @ found[f"{key}A.weight"][e * r : e * r + r]
        assert distance(ours, wanted) < 1e-5


def test_experts_are_split_and_stacked_as_they_are_computed():
    weight = torch.randn(3, 5, 7, dtype=torch.float64)
    update = ParameterUpdate(weight, False, 2, 3.0)
    for p in update.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=(), target_parameters=(DOWN, UP))
    paths = ["layers.0.mlp.experts", "layers.0.mlp.experts.base_layer"]
    down, up = sorted(places(config, paths), key=lambda place: place.path)
    assert (down.parameter, up.parameter) == ("layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj")
    experts = expert_factors(config, up, update.lora_A, update.lora_B)
    assert list(experts) == [f"{up.parameter}[{e}]" for e in range(3)]
    assert all(map(is_expert, experts))
    dense = torch.stack([factors.delta() for factors in experts.values()])
    assert torch.allclose(weight + dense, update.merged(weight), atol=1e-12)
    (path, (A, B)), = stacked(experts, 2).items()  # fmt: skip
    assert path == "layers.0.mlp.experts"  # the only parameter of its module now
    assert torch.equal(A, update.lora_A)
    assert torch.equal(B, update.lora_B)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_parameters": ["down_proj"]}, "target_parameters has down_proj without its module"),
        ({"target_parameters": ["experts.x", "experts.y"]}, "the order of its parameters"),
        ({"target_parameters": [UP, DOWN, "mlp.router"]}, "target_parameters has mlp.router, but the file has no A"),
        ({"target_parameters": [UP, DOWN, "experts.up_proj"]}, "experts.gate_up_proj, but the file has no A and B"),
        ({"rank_pattern": {}, "r": 3}, "the layer model.layers.0.mlp.experts.gate_up_proj does not have an A and a B"),
    ],
)
def test_what_the_folder_does_not_tell_is_refused(tmp_path, options, text):
    given: dict[str, Any] = {"target_modules": (), "target_parameters": (UP, DOWN)}
    one, two = (adapter_of(tmp_path / name, 1, "mixtral", **given) for name in ("one", "two"))
    with pytest.raises(AdapterError) as error:
        combined([(edited(one, **options), 1.0), (two, 1.0)], tmp_path / "out")
    assert text in str(error.value)
    assert str(one) in str(error.value)


def test_another_number_of_experts_is_another_base_model(tmp_path):
    given: dict[str, Any] = {"target_modules": (), "target_parameters": (DOWN,)}
    one, two = (adapter_of(tmp_path / name, 1, "mixtral", **given) for name in ("one", "two"))
    with pytest.raises(AdapterError, match=r"experts\.down_proj: the adapters belong .* has 4, 8 experts\."):
        combined([(one, 1.0), (edited(two, r=2, rank_pattern={}), 1.0)], tmp_path / "out")


def test_experts_that_are_stored_otherwise_are_refused(tmp_path):
    given: dict[str, Any] = {"target_modules": (), "target_parameters": (DOWN,)}
    one, two = (adapter_of(tmp_path / name, 1, "mixtral", **given) for name in ("one", "two"))
    edited(one, peft_version="0.18.1")
    with pytest.raises(AdapterError, match=r"one was written by PEFT 0\.17 or 0\.18, which .*two by a later program"):
        combined([(one, 1.0), (two, 1.0)], tmp_path / "out")
    with pytest.raises(AdapterError, match=r"one: PEFT 0\.17 and 0\.18 stored .* has no usable peft_version"):
        combined([(edited(one, peft_version=None), 1.0), (two, 1.0)], tmp_path / "out")
    combined([(edited(one, peft_version="0.18.1"), 1.0), (one, 1.0)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_version"] == "0.18.1"
