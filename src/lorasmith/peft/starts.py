"""Starts of A and B that a program asks for after get_peft_model: EVA, from its own batches, and LoftQ."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
from peft.utils.loftq_utils import _SafetensorLoader

from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.adapted import layers_of, linear_layers
from lorasmith.lora.given_start import start_from_directions, start_from_errors
from lorasmith.lora.inject import PEFT_PREFIX
from lorasmith.peft.config import core_config


def get_eva_state_dict(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """PEFT's get_eva_state_dict. Raises ConfigError for adapters with LoRA on embeddings or parameters."""
    linear = linear_layers(model, name := kwargs.get("adapter_name", "default"))
    if others := [path.removeprefix(PEFT_PREFIX) for path, _layer in layers_of(model, name) if path not in linear]:
        raise ConfigError(
            _("init_lora_weights='eva' is for linear layers only. Leave out {paths}.", paths=listed(others))
        )
    return peft.get_eva_state_dict(model, *args, **kwargs)


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
    changed = start_from_directions(tuner.model, adapter_name, core_config(config), given, keep)
    if missing := sorted(changed["target_modules"] - given.keys()):
        warnings.warn(_("A starts at random in {paths}.", paths=listed(missing)), stacklevel=2)
    vars(config).update(changed)
    tuner.set_adapter(model.active_adapters)


def replace_lora_weights_loftq(
    peft_model: Any, model_path: str | None = None, adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:  # fmt: skip
    """Start A and B at the error of quantizing, from the safetensors file of the weights as they were before.

    callback: called after each layer with the model and the layer's path; if it returns False, A and B are put back.
    Unlike in PEFT, the scaling is taken into account. Raises ValueError if no layer of the adapter is quantized.
    """
    read = _SafetensorLoader(peft_model, model_path).get_tensor
    keep = partial(callback, peft_model) if callback else bool
    if not start_from_errors(peft_model.base_model.model, adapter_name, read, keep):
        raise ValueError(_("No layer of adapter {name} is quantized.", name=adapter_name))
