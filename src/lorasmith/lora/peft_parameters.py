"""target_parameters and what belongs to it in adapter_config.json, such that PEFT adapts the same weights.

PEFT names the A and B of a layer's weight like those of the layer itself, so a layer may be named either way.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import plain_name
from lorasmith.lora.ranks import rank_and_alpha, rank_of_parameter
from lorasmith.lora.target_parameters import has_experts
from lorasmith.lora.variant import flags_of

# the names that experts had in transformers 4, as PEFT knows them (_MOE_TARGET_MODULE_MAPPING)
OF_EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def parameter_options(adapter: Adapter, model: PreTrainedModel) -> dict[str, Any]:
    """The options of adapter_config.json that depend on the parameters which are adapted directly."""
    config = adapter.config
    ranks = {f"{path}.weight": rank_and_alpha(config, path) for path in named_by_weight(adapter, model)}
    ranks |= {path: rank_of_parameter(config, adapter.targets, path) for path in adapter.targets.parameters}
    if not ranks:
        return {"target_parameters": None}
    return {
        "target_parameters": _names(list(ranks), model),
        "rank_pattern": _pattern(config, ranks, 0) | config.rank_pattern,
        "alpha_pattern": _pattern(config, ranks, 1) | config.alpha_pattern,
        "lora_dropout": 0.0,  # the only value with which PEFT loads target_parameters
    }


def whole(number: float) -> float:
    """The number as an int if it is one, as vLLM reads it."""
    return int(number) if float(number).is_integer() else number


def named_by_weight(adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """The paths of layers that must be named in target_parameters, by their weight, where PEFT does the same as else.

    In models with experts in one tensor, PEFT 0.19 and later read the names of dense layers in target_modules as those
    of experts, and leave the layers out (`_convert_peft_config_moe`).
    """
    return [] if _is_variant_in_peft(adapter) else _named_as_experts(adapter, model)


def unreadable_in_peft(adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """The paths of such layers if PEFT refuses the adapter for them: it has no variants in target_parameters."""
    return _named_as_experts(adapter, model) if _is_variant_in_peft(adapter) else []


def _is_variant_in_peft(adapter: Adapter) -> bool:
    return bool(flags_of(adapter.config)) or adapter.config.init_lora_weights == "mica"


def _named_as_experts(adapter: Adapter, model: PreTrainedModel) -> list[str]:
    named = [path for path in adapter.targets.adapted if path.rpartition(".")[2] in OF_EXPERTS]
    layers = {path: model.get_submodule(path) for path in named if has_experts(model)}
    return [path for path, m in layers.items() if isinstance(m, LoRALayer) and isinstance(m.base_layer, nn.Linear)]


def _names(wanted: list[str], model: PreTrainedModel) -> list[str]:
    """The shortest target_parameters for which PEFT selects the same parameters: the last two components, or paths."""
    names = sorted({_last_two(path) for path in wanted})
    every = (plain_name(name) for name, _p in model.named_parameters(remove_duplicate=False))
    found = {path for path in every if path and any(ends_with(path, name) for name in names)}
    return names if found == set(wanted) else wanted


def _pattern(config: LoraConfig, parameters: Mapping[str, tuple[int, float]], which: int) -> dict[str, Any]:
    """What rank_pattern (which = 0) or alpha_pattern (1) must have for parameters, for PEFT to find these values."""
    wanted = {path: values[which] for path, values in parameters.items()}
    other = {path for path, value in wanted.items() if rank_and_alpha(config, path)[which] != value}
    shared = {name for name in map(_last_two, other) if len({v for p, v in wanted.items() if ends_with(p, name)}) == 1}
    return {_last_two(path) if _last_two(path) in shared else f"^{re.escape(path)}": whole(wanted[path])
            for path in wanted if path in other}  # fmt: skip


def _last_two(path: str) -> str:
    return ".".join(path.split(".")[-2:])
