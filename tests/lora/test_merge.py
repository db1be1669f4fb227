"""Merged weights: summed in float64, one adapter's own, and refused where they would be rounded away."""

import pytest
import torch
from torch import nn

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import merged_weights, plain_name
from tests.support.families import (
    adapted,
    tiny,
)


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
