"""Quantized layers against bitsandbytes' own functions and dense products with the weight that these give back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import count, inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import merged_weight
from lorasmith.lora.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    count_parameters,
    is_quantized,
    keep_layout,
    plain_weight,
    unquantize_ends,
    unquantized,
    weight_device,
    weight_dtype,
    weight_of_bitsandbytes,
    weight_shape,
)
from lorasmith.lora.quantized_weight import FourBitWeight, Int8Weight, quantize
from lorasmith.lora.router import Router
from lorasmith.system.bitsandbytes import bitsandbytes
from tests.support.families import tiny, tiny_base
from tests.support.quantized_weights import FORMATS, by_bitsandbytes, matrix, weight_of


def layer_of(form: Any, dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantizedLinear:
    own = nn.Parameter(matrix((48,), 3, dtype), requires_grad=False) if bias else None
    return QuantizedLinear(weight_of(form, dtype=dtype), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_has_the_output_and_gradient_of_an_ordinary_one(form: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(form, dtype), matrix((2, 3, 64), 1, dtype).requires_grad_(True)
    plain = nn.Linear(64, 48)
    plain.weight.data, plain.bias.data = layer.quantized.dequantized(torch.float32), layer.bias.data.float()
    wide = x.detach().float().requires_grad_(True)
    y, wanted = layer(x), plain(wide)
    (found,) = torch.autograd.grad(y.float().square().sum(), x)
    (true,) = torch.autograd.grad(wanted.square().sum(), wide)
    limit = 1e-5 if dtype == torch.float32 else 1e-2  # a few roundings
    assert float((y - wanted).norm() / wanted.norm()) < limit
    assert float((found - true).norm() / true.norm()) < limit


def test_nothing_is_kept_for_backward() -> None:
    kept = list[Tensor]()
    layer = layer_of("nf4", bias=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(matrix((4, 64)).requires_grad_(True))
    assert not kept


@pytest.mark.parametrize("form", FORMATS)
def test_an_embedding_looks_up_the_same_rows(form: str) -> None:
    embedding = QuantizedEmbedding(weight_of(form), None)
    ids = torch.tensor([[0, 5, 47]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    assert (embedding.num_embeddings, embedding.embedding_dim) == (48, 64)
    plain = unquantized(embedding)
    assert type(plain) is nn.Embedding
    assert torch.equal(plain(ids), embedding(ids))


@pytest.mark.parametrize("form", FORMATS)
def test_generating_between_two_steps_changes_no_gradient(form: str) -> None:
    """bitsandbytes' own layer repacks its weight when it is called without gradient in eval mode."""
    layer, x = layer_of(form), matrix((4, 64), 1)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_(True)
        return torch.autograd.grad(layer(leaf).sum(), leaf)[0]

    before, state = gradient(), {name: t.clone() for name, t in layer.named_buffers()}
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    assert torch.equal(gradient(), before)
    assert all(torch.equal(t, state[name]) for name, t in layer.named_buffers())


def linear4bit(I: int = 64, O: int = 64) -> Any:
    made = bitsandbytes().nn.Linear4bit(I, O, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    made.weight = bitsandbytes().nn.Params4bit(matrix((O, I)), requires_grad=False, quant_type="nf4", module=made)
    return made.to("cpu")


def gradient_after_eval(layer: Any) -> Tensor:
    x = matrix((4, 64), 1)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    leaf = x.clone().requires_grad_(True)
    return torch.autograd.grad(layer(leaf).sum(), leaf)[0]


@pytest.mark.skipif(
    not bitsandbytes().functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 processors only"
)
def test_what_layers_of_bitsandbytes_do_and_how_it_is_prevented() -> None:
    """If the first half fails, bitsandbytes has mended it, and `keep_layout` can go."""
    W = plain_weight(linear4bit(), torch.float32)
    try:
        found = gradient_after_eval(linear4bit())
    except (RuntimeError, AttributeError):
        found = torch.zeros(4, 64)
    assert not torch.allclose(found, W.sum(0).expand(4, -1), atol=1e-3)
    kept = linear4bit()
    keep_layout(kept)
    assert torch.allclose(gradient_after_eval(kept), W.sum(0).expand(4, -1), atol=1e-4)


def test_lora_on_layers_of_bitsandbytes() -> None:
    """A model that transformers quantized: its layers stay, and keep their layout while text is generated."""
    base = tiny_base("llama", torch.float32)
    total = sum(p.numel() for p in base.model.parameters()) + 2 * (64 * 64 - 32 * 32)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        base.model.set_submodule(path, linear4bit())  # of 64 x 64: bitsandbytes 0.50 computes shorter rows wrongly
    adapter = inject(base.model, LoraConfig(r=2), base.router)
    layer = base.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoRALayer)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    with torch.no_grad():
        adapter.parameters["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].fill_(0.5)
    x = matrix((4, 64), 1)
    base.model.eval()
    with torch.no_grad():
        y = layer(x)
    base.model.train()
    W = merged_weight(layer, "default").float()
    assert torch.allclose(y, x @ W.t(), atol=1e-4)
    leaf = x.clone().requires_grad_(True)
    assert torch.allclose(torch.autograd.grad(layer(leaf).sum(), leaf)[0], W.sum(0).expand(4, -1), atol=1e-4)
    assert count(base.model, adapter).total == total + sum(p.numel() for p in adapter.parameters.values())


@pytest.mark.parametrize("nested", [True, False])
def test_the_weight_of_a_layer_of_bitsandbytes_is_taken_over(nested: bool) -> None:
    bnb = bitsandbytes()
    packed, state = bnb.functional.quantize_4bit(matrix((64, 64)), quant_type="fp4", compress_statistics=nested)
    layer = bnb.nn.Linear4bit(64, 64, bias=False)
    layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    taken = weight_of_bitsandbytes(layer, torch.bfloat16)
    assert isinstance(taken, FourBitWeight)
    assert taken.packed.data_ptr() == packed.data_ptr()
    wanted = bnb.functional.dequantize_4bit(packed, state)
    assert torch.allclose(taken.dequantized(torch.float32), wanted)
    eight = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(matrix((64, 64)).half(), requires_grad=False, has_fp16_weights=False)
    eight = eight.to("cpu")
    eight(matrix((1, 64)))  # which moves the scales into its state
    found = weight_of_bitsandbytes(eight, torch.float32)
    assert isinstance(found, Int8Weight)
    assert torch.allclose(found.dequantized(), by_bitsandbytes(matrix((64, 64)), "int8"))


def test_what_is_known_of_a_module() -> None:
    layer = layer_of("nf4", torch.bfloat16)
    inside = nn.Sequential(nn.Dropout(), layer)
    assert is_quantized(layer)
    assert not is_quantized(nn.Linear(2, 2))
    assert weight_dtype(layer) == weight_dtype(inside) == torch.bfloat16
    assert weight_dtype(nn.Linear(2, 2)) == torch.float32
    assert weight_device(inside).type == "cpu"
    assert weight_shape(layer) == (48, 64)
    assert weight_shape(nn.Embedding(3, 2)) == (3, 2)
    assert layer.weight.dtype == torch.bfloat16
    assert count_parameters(inside) == 48 * 64 + 48


def test_a_conv1d_keeps_its_layout_when_it_is_merged() -> None:
    conv = Conv1D(48, 64)
    layer = QuantizedLinear(quantize(conv.weight.t().contiguous(), "int8", torch.float32), conv.bias, transposed=True)
    x = matrix((3, 64), 1)
    assert float((layer(x) - conv(x)).norm() / conv(x).norm()) < 0.02
    assert plain_weight(layer, torch.float32).shape == conv.weight.shape
    wrapped = LoRALayer(layer, 64, 48, Router())
    wrapped.add("default", 2, 1.0, 0.0, torch.device("cpu"))
    update = wrapped.updates["default"]
    with torch.no_grad():
        for p in update.parameters.values():
            p.normal_()
    wanted = layer.weight.double() + update.matrices[1].double() @ update.matrices[0].double()
    assert torch.allclose(merged_weight(wrapped, "default"), wanted.t())


def test_ordinary_layers_take_their_place() -> None:
    layer = layer_of("nf4")
    copied = unquantized(nn.ModuleDict({"inner": nn.Sequential(copy.deepcopy(layer))}))
    x = matrix((2, 64))
    inner = copied.get_submodule("inner")
    assert type(inner[0]) is nn.Linear
    assert torch.allclose(inner(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_become_ordinary_ones(tied: bool) -> None:
    model = tiny("llama").float()
    weight = quantize(model.model.embed_tokens.weight, "int8", torch.float32)
    other = weight if tied else quantize(model.lm_head.weight, "int8", torch.float32)
    model.set_input_embeddings(QuantizedEmbedding(weight, None))
    model.set_output_embeddings(QuantizedLinear(other, None))
    unquantize_ends(model)
    assert (model.model.embed_tokens.weight is model.lm_head.weight) is tied
    assert torch.equal(model.lm_head.weight, other.dequantized())
