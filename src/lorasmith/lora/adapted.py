"""The layers and parameters that an adapter has in a model."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from lorasmith.lora.expressions import value_for
from lorasmith.lora.inject import Wrapper, adapters_of
from lorasmith.lora.layer import LoRALayer, SavedModule
from lorasmith.lora.parameters import LoRAParameters

LAYERS = tuple(kind for kind in get_args(Wrapper) if kind is not SavedModule)


def layers_of(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """The layers with LoRA by their paths, or those that have the adapter `name`."""
    for path, module in model.named_modules():
        if isinstance(module, LAYERS) and (name is None or name in adapters_of(module)):
            yield path, module


def linear_layers(model: nn.Module, name: str) -> dict[str, LoRALayer]:
    """The linear layers of the adapter `name`, by path."""
    return {path: layer for path, layer in layers_of(model, name) if isinstance(layer, LoRALayer)}


def parameters_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter, torch.dtype]]:
    """The LoRA parameters of an adapter: the name of each in PEFT's state dict, and the dtype of its base layer."""
    for path, layer in layers_of(model, name):
        dtype = next(layer.base_layer.parameters()).dtype
        if isinstance(layer, LoRAParameters):
            own = {f"{key.removesuffix('.weight')}.{name}.weight": p for key, p in layer.own_parameters(name).items()}
        else:
            named = ((key.split("."), key, p) for key, p in layer.named_parameters())
            own = {key: p for parts, key, p in named if parts[0] != "base_layer" and parts[1] == name}
        yield from ((f"{path}.{key}", p, dtype) for key, p in own.items())


def set_trained(model: nn.Module, name: str, trained: bool, is_mica: bool) -> None:
    """Train, or do not train, the LoRA parameters of an adapter. MiCA trains A alone."""
    for key, p, _dtype in parameters_of(model, name):
        p.requires_grad_(trained and not (is_mica and (".lora_B." in key or ".lora_embedding_B." in key)))


def cast_to_base(model: nn.Module, name: str) -> None:
    """Cast the LoRA parameters of an adapter to the dtypes of their base layers."""
    for _key, p, dtype in parameters_of(model, name):
        p.data = p.data.to(dtype) if dtype.is_floating_point else p.data


def tell_options(layer: Any, path: str, configs: Mapping[str, Any]) -> None:
    """Set the layer's attributes r, lora_alpha, use_rslora and so on, dictionaries by adapter as in PEFT."""
    stores = (key.partition(".")[0] for key, _p in layer.named_parameters())
    layer.adapter_layer_names = tuple(dict.fromkeys(store for store in stores if store != "base_layer"))
    layer.other_param_names, layer.get_base_layer = (), partial(getattr, layer, "base_layer")
    facts = {o: {n: getattr(c, o) for n, c in configs.items()} for o in ("use_rslora", "use_dora", "lora_bias")}
    facts["lora_alpha"] = {name: value_for(c.alpha_pattern, path, c.lora_alpha) for name, c in configs.items()}
    for key, values in (facts | {"r": {name: rank_in(layer, name) for name in adapters_of(layer)}}).items():
        known = vars(layer).setdefault(key, {})  # the same dictionary each time, which programs may hold
        known.clear()
        known.update(values)


def rank_in(layer: Any, name: str) -> int:
    """The rank that the adapter has in this layer."""
    if isinstance(layer, LoRAParameters):
        return next(iter(layer.updates[name].values())).r
    return len(layer.lora_A[name].weight if hasattr(layer, "lora_A") else layer.lora_embedding_A[name])
