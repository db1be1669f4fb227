"""Which decoders are recognized as a stack, and that its norm is the model's own."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorasmith.engine.self_test import decoder_of
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.fast.stack import DecoderStack, _norm, find_stack
from tests.support.decoding import base_of
from tests.support.families import distance


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_stack_has_the_layers_of_the_model_in_order(family: str) -> None:
    base = base_of(family)
    decoder_of(base)
    stack = find_stack(base)
    assert isinstance(stack, DecoderStack)
    assert [layer.index for layer in stack.layers] == list(range(base.model.config.num_hidden_layers))
    assert {len(layer.head_norms) for layer in stack.layers} == {2 if family == "qwen3" else 0}


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "gpt2"])
def test_another_structure_is_not_a_stack(family: str) -> None:
    base = base_of(family)
    decoder_of(base)
    assert find_stack(base) is None


def without_bank(layer: Any) -> None:
    layer.mlp.banked = ()


def with_another_norm(layer: Any) -> None:
    layer.input_layernorm = nn.Identity()


def with_another_child(layer: Any) -> None:
    layer.router = nn.Identity()


def with_attention_that_never_ran(layer: Any) -> None:
    del layer.self_attn.attention_options


@pytest.mark.parametrize("change", [without_bank, with_another_norm, with_another_child, with_attention_that_never_ran])
def test_a_single_layer_of_another_kind_is_enough(change: Any) -> None:
    base = base_of("llama")
    decoder_of(base)
    change(base.model.model.layers[1])
    assert find_stack(base) is None


@pytest.mark.parametrize(("kind", "late"), [(LlamaRMSNorm, True), (Gemma3RMSNorm, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_its_norm_is_the_models(kind: type[nn.Module], late: bool, dtype: torch.dtype) -> None:
    module = kind(16).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(16))
    x = torch.randn(3, 16, dtype=torch.float64).to(dtype)
    expected = module(x)
    recognize_modules(module)
    norm = _norm(module)
    assert norm is not None
    assert norm.late == late
    assert norm(x).dtype == dtype
    assert distance(norm(x), expected) < (1e-6 if dtype == torch.float64 else 2**-6)
