"""What PEFT's functions ask of a LoRA layer, for the layers of lorasmith.lora."""

from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorasmith.lora.inject import Wrapper, adapters_of
from lorasmith.lora.layer import SavedModule
from lorasmith.lora.parameters import LoRAParameters
from lorasmith.lora.target import value_for

LAYERS = tuple(kind for kind in get_args(Wrapper) if kind is not SavedModule)
for _kind in LAYERS:
    BaseTunerLayer.register(_kind)  # TRL asks whether the output head is one


def layers_of(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """The LoRA layers by their paths, or those that have this adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LAYERS) and (name is None or name in adapters_of(module)):
            yield path, module


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


def tell(path: str, layer: Any, tuner: Any) -> None:
    """Set the attributes that PEFT's functions and users' programs read; of them, only `scaling` has an effect."""
    names = adapters_of(layer)
    configs = {name: tuner.peft_config[name] for name in names if name in tuner.peft_config}
    stores = (key.partition(".")[0] for key, _p in layer.named_parameters())
    layer.adapter_layer_names = tuple(dict.fromkeys(store for store in stores if store != "base_layer"))
    layer.other_param_names, layer.disable_adapters = (), tuner.disabled
    layer.active_adapter = layer.active_adapters = list(tuner.active_adapters)
    layer.merged_adapters = [name for name in tuner.merged_names if name in names]
    layer.merged, layer._get_available_adapters = bool(layer.merged_adapters), partial(adapters_of, layer)
    facts = {o: {n: getattr(c, o) for n, c in configs.items()} for o in ("use_rslora", "use_dora", "lora_bias")}
    facts["lora_alpha"] = {name: value_for(c.alpha_pattern, path, c.lora_alpha) for name, c in configs.items()}
    for key, values in (facts | {"r": {name: _rank(layer, name) for name in names}}).items():
        known = vars(layer).setdefault(key, {})  # the same dictionary each time, which programs may hold
        known.clear()
        known.update(values)


def _rank(layer: Any, name: str) -> int:
    if isinstance(layer, LoRAParameters):
        return next(iter(layer.updates[name].values())).r
    return len(layer.lora_A[name].weight if hasattr(layer, "lora_A") else layer.lora_embedding_A[name])
