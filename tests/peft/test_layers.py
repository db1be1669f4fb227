"""What PEFT's functions and TRL ask of a layer."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import lorasmith.peft as ours
from lorasmith.errors import AdapterError
from lorasmith.lora.adapted import layers_of
from tests.support.peft_pair import base, ids, logits, same, trained, two


def test_layers_are_layers_of_peft_to_those_who_ask() -> None:
    layers = [layer for _path, layer in layers_of(two(ours))]
    assert len(layers) == 6
    assert all(isinstance(layer, BaseTunerLayer) for layer in layers)


def test_a_copied_layer_tells_of_its_own_adapters() -> None:
    model = two(ours)
    twin = copy.deepcopy(model)
    twin.delete_adapter("second")
    assert twin.get_model_status().available_adapters == ["first"]
    assert model.get_model_status().available_adapters == ["first", "second"]


def test_layers_have_pefts_attributes() -> None:
    def program(library: Any) -> list[Any]:
        model = two(library, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 7}, use_rslora=True)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        other = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        names = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "active_adapters", "merged_adapters")
        ranks, before = layer.r, [dict(layer.r), {n: getattr(other, n) for n in names}, dict(layer.scaling)]
        layer.scaling["first"] *= 2  # the one of them that has an effect
        out = logits(model)
        model.delete_adapter("first")
        return [before, out, ranks, layer.lora_alpha, layer.scaling, layer.get_base_layer().weight]

    same(program)


def test_adapters_are_switched_layer_by_layer() -> None:
    def program(library: Any) -> list[Any]:
        model = two(library)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(["first", "second"])
        found = [logits(model), trained(model)]
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter("second", inference_mode=True)
        return [*found, logits(model), trained(model)]

    same(program)


def test_tokens_that_are_trained_are_switched_by_themselves() -> None:
    def program(library: Any) -> list[Any]:
        torch.manual_seed(1)
        options: list[dict[str, Any]] = [{"trainable_token_indices": {"embed_tokens": [i, i + 1]}} for i in (3, 5)]
        first, second = (library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **o) for o in options)
        model = library.get_peft_model(base(), first, adapter_name="first").eval()
        model.add_adapter("second", second)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(["first", "second"])
        found = [logits(model), trained(model)]
        model.merge_adapter()
        return [*found, logits(model)]

    same(program)


def test_layers_that_are_switched_apart_are_refused() -> None:
    model = two(ours)
    layers = [layer for _path, layer in layers_of(model)]
    layers[0].set_adapter("second")
    with pytest.raises(AdapterError, match="set_adapter of single layers: 1 of 6 layers have been switched, and all"):
        logits(model)
    for layer in layers[1:]:
        layer.set_adapter("first")
    with pytest.raises(AdapterError, match="6 of 6 layers"):
        model.generate(ids())
    model.set_adapter("first")
    assert torch.equal(logits(model), logits(two(ours)))
    for layer in layers[1:]:
        layer.set_adapter("third")
    with pytest.raises(ValueError, match="third"):
        layers[0].set_adapter("third")
