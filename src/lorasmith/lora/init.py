"""Initialization of a new adapter. The model's output does not change, unless B A is not zero, as with 'random'."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer
from lorasmith.lora.parameters import LoRAParameters
from lorasmith.lora.quantized import weight_dtype
from lorasmith.lora.start_values import computed_from_weight, start_of_embedding, start_of_weight


@torch.no_grad()
def initialize(
    layer: LoRALayer | LoRAEmbedding, adapter: str, config: LoraConfig, generator: torch.Generator | None
) -> None:
    """Initialize A and B of `adapter` in place. Random numbers come from the CPU, so the device makes no difference.

    default: A Kaiming-uniform with a = sqrt(5), as in torch's Linear and PEFT, and B zero; gaussian: A from N(0, 1/r);
    eva, loftq: as default, until training/eva.py or loftq.py sets them; random: B as A in default. orthogonal: B A is
    zero, although neither is. Others: see start_values.py. For an embedding, A is zero and B from N(0, 1), as in PEFT
    and loralib; random: both from N(0, 1). generator: None is torch's global one, and draws PEFT's numbers.
    """
    if isinstance(layer, LoRAEmbedding):
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        for matrix in (A, B) if generator is None else ():
            torch.randn(matrix.shape, device=matrix.device)  # PEFT draws both once without using them
    else:
        A, B = layer.updates[adapter].own_matrices
    if not A.is_meta:
        for matrix, values in zip((A, B), _starts(layer, adapter, A, config, generator), strict=True):
            matrix.copy_(values)
    if isinstance(layer, LoRALayer):
        layer.updates[adapter].start()
    if generator is None:
        own = (A, B) if isinstance(layer, LoRAEmbedding) else layer.updates[adapter].parameters.values()
        _round(own, weight_dtype(layer.base_layer))


@torch.no_grad()
def initialize_parameters(
    layer: LoRAParameters, adapter: str, config: LoraConfig, generator: torch.Generator | None
) -> None:
    """Initialize A and B of `adapter` in place, as `initialize` does, each matrix of all experts as one, as in PEFT."""
    for update in layer.updates[adapter].values():
        if update.lora_A.is_meta:
            continue
        A, B = update.lora_A, update.lora_B
        for matrix in (A, B) if generator is None else ():
            nn.init.kaiming_uniform_(torch.empty(matrix.shape))  # PEFT draws both once without using them
        for matrix, values in zip((A, B), _random(A.shape, B.shape, update.r, config, generator), strict=True):
            matrix.copy_(values)
        if generator is None:
            _round((A, B), next(layer.base_layer.parameters()).dtype)


def _round(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Round to the base model's dtype, as PEFT does."""
    for p in parameters:
        if dtype.is_floating_point and not p.is_meta:
            p.copy_(p.to(dtype))


def _starts(
    layer: LoRALayer | LoRAEmbedding, adapter: str, A: Tensor, config: LoraConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The first A [R, I] and B [O, R]."""
    r, kind = len(A), config.init_lora_weights
    if isinstance(layer, LoRAEmbedding):
        embedding = layer.base_layer
        if kind == "mica":
            return start_of_embedding(embedding, r)
        B = torch.empty(embedding.embedding_dim, r)
        if kind == "random":
            return torch.randn(A.shape, generator=generator), B.normal_(generator=generator)
        nn.init.normal_(B, generator=generator)
        return torch.zeros_like(A), B
    if kind in ("eva", "random") and generator is None:  # PEFT keeps what nn.Linear has drawn
        B = layer.updates[adapter].own_matrices[1]
        return A.clone(), B.clone() if kind == "random" else torch.zeros_like(B)
    if computed_from_weight(config):
        seed = None if generator is None else generator.initial_seed()
        return start_of_weight(layer.base_layer, r, layer.updates[adapter].scaling, config, seed)
    if kind == "orthogonal":
        return _orthogonal(layer.in_features, layer.out_features, r, generator)
    return _random(A.shape, torch.Size((layer.out_features, r)), r, config, generator)


def _random(
    shape_A: torch.Size, shape_B: torch.Size, r: int, config: LoraConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A drawn at random; B too with 'random', and otherwise zero."""
    A, B = torch.empty(shape_A), torch.zeros(shape_B)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / r, generator=generator)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    if config.init_lora_weights == "random":
        nn.init.kaiming_uniform_(B, a=math.sqrt(5), generator=generator)
    return A, B


def _orthogonal(inputs: int, outputs: int, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A and B from the odd and the even rows of an orthogonal matrix, as PEFT makes them: B A = 0. r is even."""
    Q, _R = torch.linalg.qr(torch.randn(r, r, generator=generator))
    A = (torch.randn(inputs, r // 2, generator=generator) @ Q[0::2]).t() / 10
    return A, torch.randn(r // 2, outputs, generator=generator).t() @ Q[1::2] / 10
