"""Replacing the weights of an adapter by those of another one of the same shapes, without adding layers."""

from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict

from lorasmith.errors import AdapterError
from lorasmith.i18n import _, listed
from lorasmith.lora.files import mismatches
from lorasmith.lora.ranks import rank_and_alpha
from lorasmith.peft.config import PeftConfig, core_config
from lorasmith.peft.layers import layers_of, parameters_of

_SAME = ("use_rslora", "lora_dropout", "use_dora", "bias")


def hotswap_adapter(
    model: Any, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Give `adapter_name` the weights and scaling of another adapter folder, as PEFT's peft.utils.hotswap.

    Raises AdapterError if the two differ in their modules, shapes or options; the model is then unchanged.
    """
    path, new = str(model_name_or_path), PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    old = model.peft_config[adapter_name]
    if other := [key for key in _SAME if getattr(old, key) != getattr(new, key)]:
        text = _("{path}: differs from {name} in {keys}.", path=path, name=adapter_name, keys=listed(other))
        raise AdapterError(text)
    tensors, core = load_peft_weights(path, device=torch_device or "cpu", **kwargs), core_config(new)
    found = model.base_model._remap_adapter_state_dict_for_load(model, new, adapter_name, tensors)
    layers = dict(layers_of(model, adapter_name))
    wanted = {f"{p}.{n}": v for p, layer in layers.items() for n, v in parameters_of(layer, adapter_name).items()}
    if problems := mismatches(wanted, {key: found[key] for key in wanted}):
        raise AdapterError(*(f"{path}: {problem}" for problem in problems))
    set_peft_model_state_dict(model, tensors, adapter_name)
    for place, layer in layers.items():
        scaling = core.scaling(*rank_and_alpha(core, place.removeprefix("base_model.model.")))
        if hasattr(layer, "updates"):
            layer.updates[adapter_name].scaling = scaling
        else:
            layer.scaling[adapter_name] = scaling
