"""What PEFT's functions ask of a LoRA layer, for the layers of lorasmith.lora."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, get_args

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorasmith.lora.inject import Wrapper, adapters_of
from lorasmith.lora.layer import SavedModule

LAYERS = tuple(kind for kind in get_args(Wrapper) if kind is not SavedModule)
for _kind in LAYERS:
    BaseTunerLayer.register(_kind)  # TRL asks whether the output head is one


def layers_of(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """The LoRA layers by their paths, or those that have this adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LAYERS) and (name is None or name in adapters_of(module)):
            yield path, module


def parameters_of(layer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The LoRA parameters of an adapter in a layer, by their names there."""
    named = ((path.split("."), path, p) for path, p in layer.named_parameters())
    return {path: p for parts, path, p in named if parts[0] != "base_layer" and parts[1] == name}


def tell(layer: Any, active: Sequence[str], merged: Sequence[str], disabled: bool) -> None:
    """Set the attributes that get_layer_status and get_model_status read."""
    names = [path.partition(".")[0] for path, _p in layer.named_parameters()]
    layer.adapter_layer_names = tuple(dict.fromkeys(name for name in names if name != "base_layer"))
    layer.other_param_names, layer.disable_adapters, layer.active_adapters = (), disabled, list(active)
    layer.merged_adapters = [name for name in merged if name in adapters_of(layer)]
    layer.merged = bool(layer.merged_adapters)
    layer._get_available_adapters = partial(adapters_of, layer)
