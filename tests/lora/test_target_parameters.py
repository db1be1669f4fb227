"""Which parameters are adapted: all experts with all-linear, or those that are named; and what cannot be."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.target import ALL_LINEAR, Targets, find_targets
from lorasmith.lora.target_parameters import active_experts, expert_parameters, has_experts
from tests.support.experts import LAYOUTS, tiny_moe
from tests.support.families import tiny


def targets(family: str = "qwen3_moe", strict: bool = True, **options: Any) -> Targets:
    return find_targets(tiny_moe(family), LoraConfig(**options), strict)


def names(found: Targets) -> list[str]:
    return [path.removeprefix("model.layers.") for path in found.parameters]


def problem(family: str = "qwen3_moe", strict: bool = True, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        targets(family, strict, **options)
    (text,) = caught.value.problems
    return text


@pytest.mark.parametrize("family", LAYOUTS)
def test_all_linear_stands_for_all_experts_too(family: str) -> None:
    found, model = targets(family), tiny_moe(family)
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3]
    assert list(found.parameters) == stacks
    assert set(found.parameters.values()) == {ALL_LINEAR}
    assert has_experts(model)
    assert not has_experts(tiny("llama"))
    assert not targets(family, target_modules=("o_proj" if family != "jetmoe" else "kv_proj",)).parameters


def test_other_stacks_than_those_of_experts_are_left_alone() -> None:
    module = torch.nn.Module()
    module.stack = torch.nn.Parameter(torch.zeros(2, 3, 4))
    assert expert_parameters(module) == []


def test_options_that_select_modules_select_experts_too() -> None:
    both = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
    assert names(targets()) == both
    assert names(targets(exclude_modules=("experts",))) == []
    assert names(targets(exclude_modules=("experts.down_proj",))) == both[:1]
    assert names(targets(exclude_modules=r".*\.gate_up_proj")) == both[1:]
    assert names(targets(layers_to_transform=(0,))) == []
    assert names(targets("mixtral", last_layers=1)) == both
    assert names(targets(modules_to_save=("experts",))) == []
    assert names(targets(target_parameters=())) == []


def test_named_parameters_are_those_whose_path_ends_so() -> None:
    found = targets("mixtral", target_modules=("q_proj",), target_parameters=("experts.down_proj", "gate.weight"))
    assert names(found) == [f"{i}.mlp.{name}" for i in (0, 1) for name in ("gate.weight", "experts.down_proj")]
    assert found.parameters["model.layers.0.mlp.gate.weight"] == "gate.weight"
    assert names(targets("mixtral", target_modules=(), target_parameters=("layers.1.mlp.experts.down_proj",)))
    last = targets("mixtral", target_parameters=("experts.down_proj",), last_layers=1)
    assert names(last) == ["1.mlp.experts.down_proj"]
    given = {"target_parameters": ("experts.down_proj",), "layers_to_transform": (1,), "target_modules": ("q_proj",)}
    assert len(names(targets("mixtral", strict=False, **given))) == 2, "PEFT selects parameters by their names alone"


def test_the_weight_of_a_linear_layer_is_lora_on_the_layer() -> None:
    found = targets(target_modules=("q_proj",), target_parameters=("k_proj.weight",))
    assert [path for path in found.adapted if "k_proj" in path] == found.matched["k_proj.weight"]
    assert not found.parameters
    apart = {"rank_pattern": {"k_proj.weight": 2}}  # another rank than the layer itself would have
    assert len(targets(target_modules=("q_proj",), target_parameters=("k_proj.weight",), **apart).parameters) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_dropout": 0.1}, "dropout is applied to the input of A, but the update of model.layers.1.mlp.experts."),
        ({"init_lora_weights": "pissa"}, "not a linear layer, and this initialization supports linear layers only."),
        ({"use_dora": True}, "experts.gate_up_proj is a parameter, not a linear layer, and this variant supports"),
        ({"target_parameters": ("experts.foo",)}, "The weights of its experts are gate_up_proj, down_proj."),
        (
            {"target_parameters": ("q_norm.weight",)},
            "q_norm.weight, which has the shape (8,). LoRA supports parameters",
        ),
        ({"target_modules": ("experts",)}, "Name these in lora.target_parameters, or use all-linear, which includes"),
        ({"target_modules": ("gate_up_proj",)}, "tensors of all experts together (gate_up_proj, down_proj)."),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], says: str) -> None:
    assert says in problem(**options)


def test_what_leaves_the_weights_out_is_named() -> None:
    assert problem(lora_dropout=0.1).endswith("leave these weights out: --exclude-modules experts.")
    text = problem(target_parameters=("experts.down_proj",), lora_dropout=0.1, strict=False)
    assert text.endswith("leave these weights out: --target-parameters.")
    assert "--exclude-modules input_linear output_linear" in problem("jetmoe", use_dora=True)


def test_quantized_weights_are_refused_and_no_experts_of_all_linear() -> None:
    model = tiny_moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"experts.down_proj is quantized, and LoRA on parameters needs unquantized"):
        find_targets(model, LoraConfig(target_parameters=("experts.down_proj",)))
    assert {path.rpartition(".")[2] for path in find_targets(model, LoraConfig()).parameters} == {"gate_up_proj"}


def test_a_module_cannot_have_lora_inside_and_on_its_own_parameters() -> None:
    model = tiny_moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.scale = torch.nn.Parameter(torch.ones(4, 4))
        layer.mlp.inner = torch.nn.Linear(4, 4)
    with pytest.raises(
        ConfigError, match=r"mlp.scale belongs to model.layers.0.mlp, and LoRA is also added to .*inner"
    ):
        find_targets(model, LoraConfig(target_modules=("inner",), target_parameters=("mlp.scale",)))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (AutoConfig.for_model("qwen3_moe", num_experts_per_tok=6), 6),
        (AutoConfig.for_model("dbrx", ffn_config={"moe_top_k": 3}), 3),
        (AutoConfig.for_model("aria_text", moe_topk=5), 5),
        (AutoConfig.for_model("llama"), 1),
        (PretrainedConfig(num_experts_per_tok=None, moe_k=[2, 4]), 4),
    ],
)
def test_how_many_experts_are_active_is_read_from_the_config(config: PretrainedConfig, count: int) -> None:
    assert active_experts(config) == count
