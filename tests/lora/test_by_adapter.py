"""An adapter may have any name, also one of torch's own attributes."""

import copy

import pytest
import torch
from torch import nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.by_adapter import ModulesByAdapter, ParametersByAdapter
from lorasmith.lora.inject import inject, remove
from lorasmith.lora.merge import merged_weights
from tests.support.families import logits_of, stir, tiny_base

TAKEN = sorted({*dir(nn.ModuleDict()), *dir(nn.ParameterDict()), "weight", "bias", "base_layer", "lora_A", "default"})
EVERY_KIND = LoraConfig(r=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=("lm_head",))
PARTS = [EVERY_KIND, LoraConfig(r=2, use_dora=True)]


@pytest.mark.parametrize("config", PARTS, ids=["linear, embedding and copy", "dora"])
def test_the_name_of_an_adapter_changes_nothing(config: LoraConfig) -> None:
    wanted = None
    for name in ("plain", "train", "type", "half", "cuda", "update", "values", "compile", "T_destination", "weight"):
        base = tiny_base("llama")
        before = logits_of(base)
        adapter = inject(base.model, config, base.router, name)
        stir(adapter)
        logits = logits_of(base)
        merged = {key: weight.clone() for key, weight in merged_weights(base.model, adapter).items()}
        assert not torch.equal(logits, before)
        wanted = wanted or (adapter.parameters.keys(), logits, merged)
        assert adapter.parameters.keys() == wanted[0], name
        assert torch.equal(logits, wanted[1]), name
        assert all(torch.equal(merged[key], wanted[2][key]) for key in wanted[2]), name
        base.model.to(torch.float32).train().eval()
        remove(base.model, name)
        assert not [key for key, _p in base.model.named_parameters() if "lora_" in key or "modules_to_save" in key]


def test_items_are_modules_and_parameters_of_the_model_under_every_name() -> None:
    modules, parameters = ModulesByAdapter(), ParametersByAdapter()
    for name in TAKEN:
        modules[name], parameters[name] = nn.Linear(1, 1, bias=False), nn.Parameter(torch.zeros(1))
    assert [name for name, _p in parameters.named_parameters()] == list(parameters) == TAKEN
    assert {name.removesuffix(".weight") for name, _p in modules.named_parameters()} == set(modules) == set(TAKEN)
    for holder in (modules, parameters):
        moved = copy.deepcopy(holder).double().requires_grad_(False).eval()
        assert {p.dtype for p in moved.parameters()} == {torch.float64}
        assert not moved.training
    for name in TAKEN:
        del modules[name], parameters[name]
    assert not [*modules.parameters(), *parameters.parameters()]
