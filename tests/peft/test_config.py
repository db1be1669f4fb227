"""LoraConfig: what PEFT accepts in silence is heard."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorasmith.peft as ours
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.peft.config import Kind
from tests.support.peft_pair import base, compare, logits, two


def test_configs_are_read_as_ours(tmp_path: Path) -> None:
    two(ours).save_pretrained(tmp_path)
    config = ours.PeftConfig.from_pretrained(str(tmp_path / "first"))
    assert type(config) is ours.LoraConfig
    assert config.peft_type == ours.PeftType.LORA
    assert isinstance(config, ours.PeftConfig)
    assert (config.r, config.lora_alpha) == (4, 16)
    model = ours.PeftModel.from_pretrained(base(), tmp_path / "first", config=config)
    assert isinstance(model, ours.PeftModelForCausalLM)
    assert ours.get_peft_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"use_qalora": True, "layer_replication": [[0, 2]]},
            r"LoraConfig: unsupported PEFT options: layer_replication, use_qalora",
        ),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights='corda' is not supported by lorasmith.peft. Use peft",
        ),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"r": 0}, "LoraConfig: r: invalid value 0"),
        ({"lora_dropout": 1.5}, "LoraConfig: lora_dropout"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_options_without_effect_and_invalid_values_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises((AdapterError, ConfigError), match=text):
        ours.LoraConfig(target_modules=["q_proj"], **given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no module"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["heads"]}, "modules_to_save: 'heads' matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, "exclude_modules: 'k_prj' matches no module"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
            "matches none of the modules in target_modules",
        ),
        ({"target_modules": ["norm"]}, "LlamaRMSNorm"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_named(given: dict[str, Any], text: str) -> None:
    model = base()
    with pytest.raises((AdapterError, ConfigError), match=text):
        ours.get_peft_model(model, ours.LoraConfig(**given))
    assert torch.equal(logits(model), logits(base()))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_tied_adapters_are_refused() -> None:
    config = ours.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        ours.get_peft_model(base("qwen2"), config)


def test_files_of_newer_versions_are_read_if_their_keys_mean_nothing(tmp_path: Path) -> None:
    two(ours).save_pretrained(tmp_path)
    path = tmp_path / "first" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"use_magic": False, "magic_config": None}))
    compare(logits(ours.PeftModel.from_pretrained(base(), tmp_path / "first")), logits(two(ours)), 0)
    path.write_text(json.dumps(values | {"use_magic": True, "peft_version": "9.0"}))
    with pytest.raises(ConfigError, match=r"PEFT [\d.]+ does not know use_magic"):
        ours.PeftModel.from_pretrained(base(), tmp_path / "first")
    path.write_text(json.dumps(values | {"peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="peft_type=IA3 is not supported"):
        ours.PeftModel.from_pretrained(base(), tmp_path / "first")


def test_peft_itself_is_not_changed() -> None:
    """Our config is found in PEFT's tables under a key of its own."""
    config = peft.LoraConfig(target_modules=["q_proj"])
    theirs, mine = peft.get_peft_model(base(), config), ours.get_peft_model(base(), config)
    assert type(theirs.base_model) is peft.LoraModel
    assert type(mine.base_model) is ours.LoraModel
    assert isinstance(theirs.base_model.model.model.layers[0].self_attn.q_proj, peft.tuners.lora.Linear)
    assert not isinstance(theirs, ours.PeftModel)
    assert Kind.LORA == peft.PeftType.LORA
    assert {Kind.LORA, peft.PeftType.LORA} == {"LORA"} | {Kind.LORA}
    assert copy.deepcopy(mine.peft_config["default"]).peft_type is Kind.LORA
    with pytest.raises(ConfigError, match="peft_type=IA3"):
        ours.get_peft_model(base(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="_register_custom_module"):
        ours.LoraConfig()._register_custom_module({})


def test_a_rank_above_all_layers_is_only_warned_of() -> None:
    with pytest.warns(UserWarning, match="would have rank 64"):
        model = ours.get_peft_model(base(), ours.LoraConfig(target_modules=["q_proj"], r=64))
    assert model.get_nb_trainable_parameters()[0] == 2 * 64 * (32 + 32)
