"""Merged weights: summed in float64, one adapter's own, and refused where they would be rounded away."""

from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import merge_into, merged_weights, plain_name
from tests.support.families import adapted, distance, own_logits, stir, tiny


def test_merged_weights_of_a_bfloat16_base_are_summed_in_float64() -> None:
    base, adapter = adapted("llama", torch.bfloat16)
    merged = merged_weights(base.model, adapter)
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    W = merged["model.layers.0.mlp.up_proj.weight"]
    assert W.dtype == torch.float64
    assert torch.equal(W, layer.base_layer.weight.double() + 4.0 * (B @ A))  # lora_alpha 16, r 4


def test_merging_one_adapter_takes_nothing_of_another() -> None:
    base, first = adapted("llama")
    alone = merged_weights(base.model, first)
    other = inject(base.model, LoraConfig(r=2, target_modules=("q_proj", "lm_head")), base.router, "other")
    both = merged_weights(base.model, first)
    assert all(torch.equal(both[name], W) for name, W in alone.items())
    assert both.keys() == alone.keys()
    assert "lm_head.weight" in merged_weights(base.model, other)


def test_names_of_the_base_are_found_again_under_the_wrappers() -> None:
    base, _adapter = adapted("llama", modules_to_save=("lm_head",), target_modules=("q_proj", "embed_tokens"))
    names = [plain_name(name) for name, _p in base.model.named_parameters()]
    assert [name for name in names if name] == [name for name, _p in tiny("llama").named_parameters()]


def test_quantized_base_is_not_merged() -> None:
    base, adapter = adapted("llama", target_modules="q_proj")
    layer = base.model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(layer, LoRALayer)
    layer.base_layer.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj: the base model is quantized"):
        merged_weights(base.model, adapter)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ("q_proj", "embed_tokens")}], ids=str)
@torch.no_grad()
def test_adapters_merged_together_compute_what_they_do_unmerged(options: dict[str, Any], exact: None) -> None:
    base, _first = adapted("llama", **options)
    other = inject(base.model, LoraConfig(r=2, **options), base.router, "other")
    stir(other)
    base.router.activate(["default", "other"])
    wanted = own_logits(base)
    before = merge_into(base.model, ["default", "other"], keep=True, check=True)
    base.router.activate([])
    assert distance(own_logits(base), wanted) < 1e-12
    for name, weight in before.items():
        base.model.get_parameter(name).copy_(weight)
    assert not distance(own_logits(base), wanted) < 1e-2
    base.router.activate(["default", "other"])
    assert torch.equal(own_logits(base), wanted)


def test_a_broken_adapter_is_named_before_anything_is_merged() -> None:
    base, adapter = adapted("llama")
    plain = {name: p.clone() for name, p in base.model.named_parameters()}
    next(iter(adapter.parameters.values())).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        merge_into(base.model, ["default"], keep=False, check=True)
    assert all(torch.equal(p, plain[name]) for name, p in base.model.named_parameters() if "base_layer" in name)
