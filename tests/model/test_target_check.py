"""Targets that a model does not call are refused by name before a training begins."""

import copy
from typing import Any

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError, ModelError
from lorasmith.lora.inject import inject
from lorasmith.model import target_check
from lorasmith.model.base import Base
from lorasmith.model.target_check import check_targets
from lorasmith.model.verify import enable_fast_parts
from tests.support.families import adapted, one_linear, tiny_base

IDS = [5, 17, 60, 3, 8, 44, 92, 31, 9, 9, 12, 71, 4, 20, 6, 50]


def adapt(base: Base, **options: Any) -> None:
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, **options), base.router, "a")
    check_targets(base, "a", IDS)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_weight_that_the_model_takes_by_itself_is_refused_by_name(family: str, load: Any) -> None:
    base = load(family)
    kind = type(base.model).__name__
    with pytest.raises(ConfigError) as caught:
        adapt(base)
    assert str(caught.value) == (
        f"lora.target_modules: {kind} computes with the weight of dt_proj and never calls the module, so LoRA on it "
        "would change nothing. Leave it out: --exclude-modules dt_proj"
    )
    assert not any(
        p.requires_grad for p in base.model.get_submodule("backbone.layers.0.mixer.dt_proj").base_layer.parameters()
    )


def test_without_it_mamba_learns(load: Any) -> None:
    base = load("mamba")
    adapt(base, exclude_modules="dt_proj")
    enable_fast_parts(base, "a", IDS)


def test_a_copy_of_such_a_module_is_refused_too(load: Any) -> None:
    base = load("mamba")
    with pytest.raises(
        ConfigError, match=r"lora\.modules_to_save: MambaForCausalLM computes with the weight of dt_proj"
    ):
        adapt(base, target_modules="in_proj", modules_to_save=("dt_proj",))


def test_a_model_that_fails_with_an_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = adapted("llama", target_modules="q_proj")
    base.adapters["default"] = adapter

    def fail(*_args: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(target_check, "trial_loss", fail)
    with pytest.raises(
        ModelError, match=r"a training step with LoRA on q_proj fails in this model \(AttributeError: no such"
    ):
        check_targets(base, "default", IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_trial_leaves_everything_as_it_was(family: str) -> None:
    base = tiny_base(family)
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, lora_dropout=0.5), base.router, "a")
    before, fast, state = copy.deepcopy(base.model.state_dict()), base.fast_parts, torch.get_rng_state()
    check_targets(base, "a", IDS)
    assert base.fast_parts == fast
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(base.model.state_dict()[key], value) for key, value in before.items())
    assert one_linear(family) in {key.split(".")[-3] for key in base.adapters["a"].parameters}
