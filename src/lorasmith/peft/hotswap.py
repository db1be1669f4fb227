"""Replacing the weights of an adapter by those of another one of the same shapes, without adding layers."""

from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict

from lorasmith.errors import AdapterError
from lorasmith.i18n import _, listed
from lorasmith.lora.inject import rank_and_alpha
from lorasmith.peft.config import PeftConfig, core_config
from lorasmith.peft.layers import layers_of, parameters_of

_SAME = ("use_rslora", "lora_dropout", "use_dora", "bias")


@torch.no_grad()
def hotswap_adapter(
    model: Any, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Give `adapter_name` the weights and scaling of another adapter folder, as PEFT's peft.utils.hotswap.

    Raises AdapterError if the two differ in their modules, shapes or options; the model is then unchanged.
    """
    path, new = str(model_name_or_path), PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    old = model.peft_config[adapter_name]
    if changed := [key for key in _SAME if getattr(old, key) != getattr(new, key)]:
        raise AdapterError(
            _("{path}: not the options of {name}: {keys}.", path=path, name=adapter_name, keys=listed(changed))
        )
    tensors, core = load_peft_weights(path, device=torch_device or "cpu", **kwargs), core_config(new)
    tuner, layers = model.base_model, dict(layers_of(model, adapter_name))
    found = tuner._remap_adapter_state_dict_for_load(model, new, adapter_name, tensors)
    for place, layer in layers.items():
        for n, p in parameters_of(layer, adapter_name).items():
            if found[f"{place}.{n}"].shape != p.shape:
                raise AdapterError(
                    _(
                        "{path}: {key} has the shape {found}, but that of {name} is {need}. Load it as an adapter of "
                        "its own.",
                        path=path,
                        key=f"{place}.{n}",
                        found=tuple(found[f"{place}.{n}"].shape),
                        name=adapter_name,
                        need=tuple(p.shape),
                    )
                )
    set_peft_model_state_dict(model, tensors, adapter_name)
    for place, layer in layers.items():
        scaling = core.scaling(*rank_and_alpha(core, place.removeprefix("base_model.model.")))
        if hasattr(layer, "updates"):
            layer.updates[adapter_name].scaling = scaling
        else:
            layer.scaling[adapter_name] = scaling
