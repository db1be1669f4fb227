"""What PEFT's functions ask of a LoRA layer, for the layers of lorasmith.lora."""

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from lorasmith.lora.adapted import LAYERS, rank_in
from lorasmith.lora.inject import adapters_of
from lorasmith.lora.target import value_for

for _kind in LAYERS:
    BaseTunerLayer.register(_kind)  # TRL asks whether the output head is one


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
    for key, values in (facts | {"r": {name: rank_in(layer, name) for name in names}}).items():
        known = vars(layer).setdefault(key, {})  # the same dictionary each time, which programs may hold
        known.clear()
        known.update(values)
