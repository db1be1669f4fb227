"""Modules on which the loss does not depend are left out of an adapter before a training begins, and named."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError, ModelError
from lorasmith.lora.files import save_adapter
from lorasmith.lora.inject import inject
from lorasmith.model import target_check
from lorasmith.model.base import Base
from lorasmith.model.target_check import check_targets
from lorasmith.model.verify import enable_fast_parts, trial_loss
from lorasmith.system.transformers_logging import quiet_transformers
from tests.support.experts import moe_base
from tests.support.families import adapted, distance, logits_of, one_linear, stir, tiny_base
from tests.support.tiny import Watch

IDS = [5, 17, 60, 3, 8, 44, 92, 31, 9, 9, 12, 71, 4, 20, 6, 50]


def adapt(base: Base, watch: Watch | None = None, **options: Any) -> list[str]:
    """Adds the adapter `a` and returns what was said."""
    watch = watch or Watch()
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, **options), base.router, "a")
    check_targets(base, "a", IDS, watch)
    return watch.said


def assert_every_part_learns(base: Base) -> None:
    loss, _tokens = trial_loss(base, "a", IDS)
    adapter = base.adapters["a"]
    gradients = torch.autograd.grad(loss, [p for key, p in adapter.parameters.items() if ".lora_B." in key])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert len(gradients) == len(adapter.targets.adapted) + len(adapter.targets.parameters)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_all_linear_leaves_out_a_weight_that_the_model_takes_by_itself(family: str, load: Any) -> None:
    base = load(family)
    kind = type(base.model).__name__
    assert adapt(base) == [
        f"dt_proj: no adapter, because {kind} computes with the weight of these layers without calling them",
        f"out_proj: no adapter, because PEFT refuses LoRA on these layers of {kind}. To train them for use in "
        "lorasmith, name them in --target-modules.",
    ]
    assert {path.rpartition(".")[2] for path in base.adapters["a"].targets.adapted} == {"in_proj", "x_proj"}
    assert type(base.model.get_submodule("backbone.layers.0.mixer.dt_proj")) is torch.nn.Linear
    assert_every_part_learns(base)
    enable_fast_parts(base, "a", IDS)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"])
def test_what_peft_refuses_is_trained_if_it_is_named_and_said(family: str, load: Any, tmp_path: Path) -> None:
    base = load(family)
    watch = Watch()
    assert adapt(base, watch, target_modules=("in_proj", "out_proj")) == []
    assert watch.warned == [
        f"out_proj: PEFT refuses LoRA on these layers of {type(base.model).__name__}, so PEFT and the programs that "
        "use it cannot load this adapter. Merge it for them, or leave the layers out."
    ]
    assert_every_part_learns(base)
    save_adapter(base.adapters["a"], base.model, tmp_path, "")
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.PeftModel.from_pretrained(load(family).model, tmp_path)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_asked_for_by_its_name_it_is_refused(option: str, load: Any) -> None:
    base = load("mamba")
    with pytest.raises(ConfigError) as caught:
        adapt(
            base, **{"target_modules": ("in_proj",)} | {option: ("in_proj", "dt_proj")[option == "modules_to_save" :]}
        )
    assert str(caught.value) == (
        f"lora.{option}: MambaForCausalLM computes with the weight of dt_proj and never calls the module, so training "
        "would change nothing there. Leave it out."
    )
    wrapper = base.model.get_submodule("backbone.layers.0.mixer.dt_proj")
    frozen = wrapper.base_layer if option == "target_modules" else wrapper.original_module
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"])
def test_hybrids_learn_with_the_default_targets(family: str, load: Any) -> None:
    base = load(family)
    adapt(base)
    assert_every_part_learns(base)
    enable_fast_parts(base, "a", IDS)


def test_an_image_encoder_is_left_out_and_said(load: Any, tmp_path: Path) -> None:
    base = load("gemma3")
    said = adapt(base)
    paths = base.adapters["a"].targets.adapted
    assert len(paths) == 2 * 7
    assert not [path for path in paths if "language_model" not in path]
    (text,) = said
    assert text.startswith("15 linear layers get no adapter, because a text does not reach them: model.vision_tower.")
    assert_every_part_learns(base)
    with pytest.raises(
        ConfigError, match=r"the loss does not depend on any module that 'fc1' matches \(model\.vision_t"
    ):
        adapt(load("gemma3"), target_modules=("q_proj", "fc1"))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), r".*\.(q_proj|fc1)"])
def test_what_is_saved_is_what_was_left_and_is_read_again(targets: Any, load: Any, tmp_path: Path) -> None:
    base = load("gemma3")
    adapt(base, target_modules=targets)
    stir(base.adapters["a"])
    save_adapter(base.adapters["a"], base.model, tmp_path / "adapter", "")
    again = load("gemma3")
    AdapterFolder.read(tmp_path / "adapter").load_into(again, "a")
    assert again.adapters["a"].parameters.keys() == base.adapters["a"].parameters.keys()
    ids = torch.tensor([IDS])
    assert torch.equal(logits_of(again, ids), logits_of(base, ids))
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(base.folder)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert distance(logits_of(theirs, ids), logits_of(base, ids)) < 1e-5
    assert sum(".lora_B." in key for key, _p in theirs.named_parameters()) == len(base.adapters["a"].targets.adapted)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_what_is_left_out_follow_the_option(bias: str, load: Any) -> None:
    base = load("gemma3")
    adapt(base, bias=bias)
    biases = [key for key in base.adapters["a"].parameters if key.endswith("bias")]
    of_vision = [key for key in biases if "vision" in key]
    assert bool(of_vision) == (bias == "all")
    assert not [key for key in of_vision if "base_layer" in key]
    assert {id(p) for p in base.model.parameters() if p.requires_grad} == {
        id(p) for p in base.adapters["a"].parameters.values()
    }


def test_an_expert_that_gets_no_token_keeps_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = adapted("llama", target_modules=("gate_proj", "q_proj"))
    base.adapters["default"] = adapter
    keys, grad = list(adapter.parameters), torch.autograd.grad

    def without_first_layer(loss: Any, inputs: Any, **options: Any) -> Any:
        found = grad(loss, inputs, **options)
        if len(found) != len(keys):
            return found
        return [None if "layers.0.mlp" in key else g for key, g in zip(keys, found, strict=True)]

    monkeypatch.setattr(torch.autograd, "grad", without_first_layer)
    check_targets(base, "default", IDS, Watch())
    assert list(base.adapters["default"].parameters) == keys


def test_a_model_that_fails_with_an_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = adapted("llama", target_modules="q_proj")
    base.adapters["default"] = adapter

    def fail(*_args: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(target_check, "trial_loss", fail)
    with pytest.raises(
        ModelError, match=r"a training step with LoRA on q_proj fails in this model \(AttributeError: no such"
    ):
        check_targets(base, "default", IDS, Watch())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_trial_leaves_everything_as_it_was(family: str) -> None:
    base = tiny_base(family)
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, lora_dropout=0.5), base.router, "a")
    before, fast, state = copy.deepcopy(base.model.state_dict()), base.fast_parts, torch.get_rng_state()
    check_targets(base, "a", IDS, Watch())
    assert base.fast_parts == fast
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(base.model.state_dict()[key], value) for key, value in before.items())
    assert one_linear(family) in {key.split(".")[-3] for key in base.adapters["a"].parameters}


class _Indifferent(torch.nn.Module):
    """Experts of Mixtral whose output does not depend on some of their weights."""

    def __init__(self, experts: torch.nn.Module, reads: tuple[str, ...]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.reads = experts.gate_up_proj, experts.down_proj, reads

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        return hidden_states + sum(getattr(self, name)[top_k_index[0, 0]].sum() for name in self.reads)


def indifferent(*reads: str) -> Base:
    base = moe_base("mixtral", torch.float32)
    _Indifferent.__name__ = "IndifferentExperts"
    for layer in base.model.model.layers:
        layer.mlp.experts = _Indifferent(layer.mlp.experts, reads)
    return base


def test_experts_on_whose_weights_nothing_depends_are_left_out_aloud() -> None:
    base = indifferent("down_proj")
    (text,) = adapt(base)
    assert text == (
        "gate_up_proj: no adapter, because the loss of a text does not depend on these weights of MixtralForCausalLM"
    )
    left = base.adapters["a"]
    assert {path.rpartition(".")[2] for path in left.targets.parameters} == {"down_proj"}
    assert {key for key in left.parameters if "experts" in key} == {
        f"base_model.model.model.layers.{i}.mlp.experts.lora_{m}.weight" for i in (0, 1) for m in "AB"
    }


def test_experts_that_are_named_and_get_no_gradient_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        adapt(indifferent("down_proj"), target_modules=("q_proj",), target_parameters=("experts.gate_up_proj",))
    (text,) = caught.value.problems
    assert text.startswith("lora.target_parameters: the loss does not depend on any module that 'experts.gate_up_proj'")


def test_experts_whose_weights_the_model_takes_by_itself_are_left_out_aloud() -> None:
    base = moe_base("mixtral", torch.float32)
    for layer in base.model.model.layers:
        experts = layer.mlp.experts

        def forward(hidden: torch.Tensor, mlp: torch.nn.Module = layer.mlp) -> torch.Tensor:
            return hidden @ mlp.experts.down_proj[0] @ mlp.experts.down_proj[1].t()

        assert experts.down_proj.shape[1] == 32
        layer.mlp.forward = forward
    assert adapt(base) == [
        "down_proj: no adapter, because MixtralForCausalLM computes with the weight of these layers without calling "
        "them",
        "gate_up_proj: no adapter, because the loss of a text does not depend on these weights of MixtralForCausalLM",
    ]
    assert not base.adapters["a"].targets.parameters
