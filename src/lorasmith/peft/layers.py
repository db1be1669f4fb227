"""What PEFT's functions ask of a LoRA layer, for the layers of lorasmith.lora."""

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from lorasmith.lora.adapted import LAYERS, tell_options
from lorasmith.lora.inject import adapters_of

for _kind in LAYERS:
    BaseTunerLayer.register(_kind)  # TRL asks whether the output head is one


def tell(path: str, layer: Any, tuner: Any) -> None:
    """Set the attributes that PEFT's functions and users' programs read; of them, only `scaling` has an effect."""
    names = adapters_of(layer)
    configs = {name: tuner.peft_config[name] for name in names if name in tuner.peft_config}
    layer.set_adapter, layer.disable_adapters = partial(tuner.set_in_layer, path), tuner.disabled
    layer.active_adapter = layer.active_adapters = list(tuner.active_adapters)
    layer.merged_adapters = [name for name in tuner.merged_names if name in names]
    layer.merged, layer._get_available_adapters = bool(layer.merged_adapters), partial(adapters_of, layer)
    tell_options(layer, path, configs)
