"""Starts of A and B that a program asks for after get_peft_model: EVA, from its own batches, and LoftQ."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.utils.loftq_utils import _SafetensorLoader

from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.given_start import linear_layers, start_from_directions, start_from_error
from lorasmith.lora.inject import PEFT_PREFIX
from lorasmith.lora.quantized import is_quantized
from lorasmith.peft.config import core_config
from lorasmith.peft.layers import layers_of


def get_eva_state_dict(model: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """PEFT's get_eva_state_dict. Raises ConfigError for adapters with LoRA on embeddings or parameters."""
    linear = linear_layers(model, name := kwargs.get("adapter_name", "default"))
    if others := [path for path, _layer in layers_of(model, name) if path not in linear]:
        raise ConfigError(
            _("init_lora_weights='eva' is for linear layers only. Leave out {paths}.", paths=listed(others))
        )
    found: dict[str, torch.Tensor] = peft.get_eva_state_dict(model, *args, **kwargs)
    return found


def initialize_lora_eva_weights(
    model: Any, dataloader: Any = None, eva_state_dict: Any = None, *args: Any, adapter_name: str = "default",
    **kwargs: Any,
) -> None:  # fmt: skip
    """Start A at the main directions of the layers' inputs on these batches, as PEFT's function of this name does.

    Raises ValueError if the adapter was not made for EVA, or without batches; see `start_from_directions` for others.
    """
    tuner, config = model.base_model, model.peft_config[adapter_name]
    if config.init_lora_weights != "eva" or (dataloader is None and eva_state_dict is None):
        raise ValueError(_("initialize_lora_eva_weights needs init_lora_weights='eva', and a dataloader or the result "
                           "of get_eva_state_dict."))  # fmt: skip
    if eva_state_dict is None:
        eva_state_dict = get_eva_state_dict(model, dataloader, None, *args, adapter_name=adapter_name, **kwargs)
    given = {key.removeprefix(PEFT_PREFIX): directions for key, directions in eva_state_dict.items()}
    keep = config.eva_config.adjust_scaling_factors
    ranks = start_from_directions(tuner.model, adapter_name, core_config(config), given, keep)
    if missing := [path for path in ranks if path not in given]:
        warnings.warn(_("A starts at random in {paths}.", paths=listed(missing)), stacklevel=2)
    config.target_modules = set(ranks)
    config.rank_pattern = {path: r for path, (r, _alpha) in ranks.items() if r != config.r}
    config.alpha_pattern = {path: alpha for path, (_r, alpha) in ranks.items() if alpha != config.lora_alpha}
    tuner.set_adapter(model.active_adapters)


def replace_lora_weights_loftq(
    peft_model: Any, model_path: str | None = None, adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:  # fmt: skip
    """Start A and B at the error of quantizing, from the safetensors file of the weights as they were before.

    callback: called after each layer with the model and the layer's path; if it returns False, A and B are put back.
    Unlike in PEFT, the scaling is taken into account. Raises ValueError if no layer of the adapter is quantized.
    """
    layers = linear_layers(peft_model.base_model.model, adapter_name)
    layers = {path: layer for path, layer in layers.items() if is_quantized(layer.base_layer)}
    if not layers:
        raise ValueError(_("No layer of adapter {name} is quantized.", name=adapter_name))
    originals = _SafetensorLoader(peft_model, model_path)  # type: ignore[no-untyped-call]
    for path, layer in layers.items():
        matrices = layer.updates[adapter_name].own_matrices
        before = [matrix.detach().clone() for matrix in matrices]
        start_from_error(layer, adapter_name, originals.get_tensor(f"{path}.weight"))  # type: ignore[no-untyped-call]
        if callback and not callback(peft_model, path):
            for matrix, own in zip(matrices, before, strict=True):
                matrix.data.copy_(own)
