"""What adapter_config.json says of parameters: PEFT adapts the same weights, those of dense layers too."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject
from lorasmith.model.target_check import check_targets
from tests.lora.test_parameters import LIMIT, adapted, assert_same, in_peft
from tests.support.experts import moe_base, tiny_moe
from tests.support.families import distance, logits_of, own_logits, stir
from tests.support.tiny import Watch

pytestmark = [pytest.mark.usefixtures("exact"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]


@pytest.mark.parametrize("case", ["dense names", "ranks", "all-linear but experts", "one layer", "router"])
def test_peft_reads_dense_layers_with_names_of_experts(case: str, tmp_path: Path) -> None:
    """PEFT takes gate_proj, up_proj and down_proj in target_modules for those of experts, and leaves the layers out."""
    options: dict[str, Any] = {
        "dense names": {"target_modules": ("o_proj", "gate_proj", "down_proj")},
        "ranks": {"rank_pattern": {"down_proj": 3, "o_proj": 2}, "alpha_pattern": {"shared_experts.up_proj": 5}},
        "all-linear but experts": {"exclude_modules": ("experts",)},
        "one layer": {"last_layers": 1},
        "router": {"target_modules": ("o_proj",), "target_parameters": ("gate.weight", "experts.down_proj")},
    }[case]
    base, adapter = adapted("deepseek_v3", **options)
    save_adapter(adapter, base.model, tmp_path, "the/base")
    assert_same(base, adapter, in_peft("deepseek_v3", tmp_path))
    again = moe_base("deepseek_v3")
    AdapterFolder.read(tmp_path).load_into(again, "default")
    loaded = again.adapters["default"]
    assert set(loaded.targets.adapted) == set(adapter.targets.adapted), "LoRA on a layer, not on its weight"
    assert distance(logits_of(again.model), logits_of(base.model)) < LIMIT


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "mica"}])
def test_what_peft_cannot_load_is_told(option: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = adapted("qwen3_moe", torch.float32, exclude_modules=("experts",), **option)
    save_adapter(adapter, base.model, tmp_path, "the/base")
    with pytest.raises(ValueError, match=r"does not work with|unsupported variant"):
        peft.PeftModel.from_pretrained(tiny_moe("qwen3_moe", torch.float32), tmp_path)
    watch = Watch()
    check_targets(base, "default", list(range(3, 20)), watch)
    (text,) = watch.warned
    assert text.startswith("gate_proj, up_proj, down_proj: PEFT refuses LoRA on these layers of Qwen3Moe")
    base, _adapter = adapted("qwen3_moe", target_modules=("q_proj",), **option)
    check_targets(base, "default", list(range(3, 20)), watch := Watch())
    assert watch.warned == []


def test_biases_of_experts_have_pefts_keys(tmp_path: Path) -> None:
    """PEFT wraps the module once for each of its parameters, and its biases are inside."""
    base, adapter = adapted("gpt_oss", bias="all")
    save_adapter(adapter, base.model, tmp_path, "the/base")
    theirs = in_peft("gpt_oss", tmp_path)
    assert adapter.parameters.keys() <= {name.replace(".default", "") for name in theirs.state_dict()}
    assert any(key.endswith("experts.base_layer.base_layer.gate_up_proj_bias") for key in adapter.parameters)
    assert distance(own_logits(theirs), own_logits(base.model)) < LIMIT
    again = moe_base("gpt_oss")
    AdapterFolder.read(tmp_path).load_into(again, "default")
    assert distance(logits_of(again.model), logits_of(base.model)) < LIMIT


@pytest.mark.parametrize("start", ["orthogonal", "eva", "gaussian", "random", "pissa", "mica"])
def test_dense_layers_named_by_their_weight_can_have_any_start(start: str, tmp_path: Path) -> None:
    """A start that parameters cannot have: these are layers. PEFT takes MiCA for a variant, and refuses it here."""
    base, adapter = adapted("qwen3_moe", exclude_modules=("experts",), init_lora_weights=start)
    save_adapter(adapter, base.model, tmp_path, "the/base")
    again = moe_base("qwen3_moe")
    AdapterFolder.read(tmp_path).load_into(again, "default")
    assert set(again.adapters["default"].targets.adapted) == set(adapter.targets.adapted)
    assert distance(logits_of(again.model), logits_of(base.model)) < LIMIT
    if start != "mica":
        assert distance(own_logits(in_peft("qwen3_moe", tmp_path)), own_logits(base.model)) < LIMIT


def test_the_files_are_as_in_pefts_documentation(tmp_path: Path) -> None:
    base, adapter = adapted("mixtral")
    save_adapter(adapter, base.model, tmp_path, "the/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["rank_pattern"] == {"experts.down_proj": 2, "experts.gate_up_proj": 2}, "r / 2 active experts"
    shapes = {key.partition("layers.0.mlp.")[2]: tuple(p.shape) for key, p in adapter.parameters.items()}
    assert shapes["experts.base_layer.lora_A.weight"] == (4 * 2, 32)
    assert shapes["experts.base_layer.lora_B.weight"] == (2 * 48, 2 * 4)
    assert shapes["experts.lora_A.weight"] == (4 * 2, 48)
    assert shapes["experts.lora_B.weight"] == (32, 2 * 4)


def test_one_layer_of_many_is_named_by_its_path(tmp_path: Path) -> None:
    base, adapter = adapted("mixtral", last_layers=1, alpha_pattern={"q_proj": 2.5})
    save_adapter(adapter, base.model, tmp_path, "the/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    assert distance(own_logits(in_peft("mixtral", tmp_path)), own_logits(base.model)) < LIMIT


def test_without_parameters_nothing_changes_in_the_file(tmp_path: Path) -> None:
    base = moe_base("mixtral")
    options = {"target_modules": ("q_proj",), "lora_dropout": 0.1, "rank_pattern": {"q_proj": 2}}
    adapter = inject(base.model, LoraConfig(**options), base.router)
    stir(adapter)
    save_adapter(adapter, base.model, tmp_path, "the/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_parameters"], config["lora_dropout"]) == (None, 0.1)
    assert config["rank_pattern"] == {"q_proj": 2}
    assert distance(logits_of(in_peft("mixtral", tmp_path)), logits_of(tiny_moe("mixtral"))) > 0.01
