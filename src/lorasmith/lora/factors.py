"""The matrices of the adapters in a model, to combine them."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.adapted import layers_of
from lorasmith.lora.combine import Factors, padded
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer
from lorasmith.lora.update import Update


def factors_of(path: str, layer: LoRALayer | LoRAEmbedding, adapter: str) -> Factors:
    """The matrices of a plain low-rank update, to combine it with others. Raises AdapterError for a variant."""
    if isinstance(layer, LoRAEmbedding):
        return Factors(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], layer.scaling[adapter])
    update = layer.updates[adapter]
    if type(update) is not Update:
        text = _(
            "{path}: adapter {name} is no plain LoRA, so it cannot be combined with others.", path=path, name=adapter
        )
        raise AdapterError(text)
    return Factors(*update.own_matrices, update.scaling)


def factors_in(model: nn.Module, adapter: str) -> dict[str, Factors]:
    """The matrices of all layers of the adapter, by path. Raises AdapterError for a variant."""
    return {path: factors_of(path, layer, adapter) for path, layer in layers_of(model, adapter)}


def largest_rank(adapters: Sequence[Mapping[str, Factors]]) -> int:
    """The largest rank that the update of any layer can have."""
    return max(min(factors.shape) for layers in adapters for factors in layers.values())


@torch.no_grad()
def set_factors(model: nn.Module, adapter: str, found: Mapping[str, Factors], rank: int) -> None:
    """Give the adapter these matrices, filled up with zeros to its rank."""
    for path, own in factors_in(model, adapter).items():
        new = padded(found[path], rank)
        own.A_RI.copy_(new.A_RI)
        own.B_OR.copy_(new.B_OR)
