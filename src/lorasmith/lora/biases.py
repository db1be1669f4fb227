"""Trained biases, which are the base model's own parameters (PEFT's option bias)."""

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.parameters import LoRAParameters

HALF_PRECISION = (torch.bfloat16, torch.float16)


def bias_conflict(name: str, bias: str) -> AdapterError:
    """The error for an adapter with trained biases, which are the base model's own, beside other adapters."""
    return AdapterError(
        _(
            "adapter {name!r}: bias={bias!r} changes the base model itself, so it cannot be shared with "
            "other adapters.",
            name=name,
            bias=bias,
        )
    )


def refuse_rounded_biases(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ConfigError for trained biases in half precision: they have no float32 copy, so each step would round."""
    half = [n for n, p in model.named_parameters() if n.endswith("bias") and p.dtype in HALF_PRECISION]
    if config.bias != "none" and half:
        raise ConfigError(
            _(
                "lora.bias: {bias!r} trains biases of the base model, such as {name}, but this base model is "
                "in half precision, which would round them at every step. Load it with --dtype float32.",
                bias=config.bias,
                name=half[0],
            )
        )


def trained_biases(model: nn.Module, config: LoraConfig, own: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Unfreeze the base model's biases that the option `bias` selects; returns them by their names in PEFT."""
    if config.bias == "none":
        return {}
    mine = {id(p) for p in own.values()}
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("bias") and id(p) not in mine]
    if config.bias == "lora_only":
        named = [(n, p) for n, p in named if n.endswith(".base_layer.bias")]
    for _name, parameter in named:
        parameter.requires_grad_(True)
    return {_in_peft(model, name): parameter for name, parameter in named}


def _in_peft(model: nn.Module, name: str) -> str:
    """The name in PEFT, which wraps a module once for each of its parameters that is adapted."""
    path, inside, own = name.rpartition(".base_layer.")
    module = model.get_submodule(path) if inside else None
    if not isinstance(module, LoRAParameters):
        return name
    depth = max(map(len, module.updates.values()))
    return f"{path}{'.base_layer' * depth}.{own}"
