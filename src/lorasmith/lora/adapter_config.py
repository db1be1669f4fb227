"""adapter_config.json, the options of an adapter in PEFT's format: parsing it, and writing it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasmith.config.files import parse_object
from lorasmith.config.lora import LoraConfig, is_name
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.peft_parameters import named_by_weight, parameter_options, whole
from lorasmith.lora.target import ends_with, is_adaptable
from lorasmith.lora.target_parameters import has_experts
from lorasmith.lora.token_rows import peft_token_indices
from lorasmith.lora.variant import VARIANTS, flags_of

ADAPTER_CONFIG = "adapter_config.json"
# PEFT's defaults for options missing from adapter_config.json. Our own LoraConfig differs: its lora_alpha is 16.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
_SUPPORTED = {  # implemented here, or without influence on the output; any other option that is set is rejected
    *PEFT_DEFAULTS, "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    "modules_to_save", "init_lora_weights", "peft_type", "task_type", "base_model_name_or_path", "inference_mode",
    "auto_mapping", "peft_version", "revision", "fan_in_fan_out", "layers_pattern", "megatron_core", "runtime_config",
    "eva_config", "qalora_group_size", "trainable_token_indices", "target_parameters",
}  # fmt: skip
_MLX = {"fine_tune_type", "lora_parameters", "lora_layers"}  # options of mlx-lm in a file of the same name
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that do not change W


def peft_config(adapter: Adapter, model: PreTrainedModel, base: str) -> dict[str, Any]:
    """The content of adapter_config.json, as PEFT 0.14 and later read it."""
    config, layers = adapter.config, dict(model.named_modules())
    first = next((layers[p] for p in adapter.targets.adapted), None)
    own = config.model_dump(include={*PEFT_DEFAULTS, "rank_pattern", "alpha_pattern", *flags_of(config)})
    return own | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "lora_alpha": whole(config.lora_alpha),
        "target_modules": _peft_targets(adapter, model),
        "modules_to_save": list(config.modules_to_save) or None,
        "init_lora_weights": True if config.init_lora_weights == "default" else "gaussian",
        "fan_in_fan_out": isinstance(first, LoRALayer) and isinstance(first.base_layer, Conv1D),
        "exclude_modules": None,  # already applied to target_modules
        "trainable_token_indices": peft_token_indices(model, adapter.tokens),
        "inference_mode": True,
        **parameter_options(adapter, model),
    }


def _peft_targets(adapter: Adapter, model: PreTrainedModel) -> str | list[str]:
    """The shortest target_modules for which PEFT selects the same modules: an expression, names, or full paths."""
    config, modules, by_weight = adapter.config, _base_modules(model), named_by_weight(adapter, model)
    wanted = [path for path in adapter.targets.adapted if path not in by_weight]
    value = config.target_modules
    filtered = config.exclude_modules or config.layers_to_transform is not None or config.last_layers is not None
    is_expression = isinstance(value, str) and value != "all-linear" and not is_name(value) and not filtered
    is_expression &= not has_experts(model)  # of which PEFT would only keep the last names that it matches
    if is_expression and {p for p in modules if re.fullmatch(str(value), p)} == set(wanted):
        return str(value)
    names = sorted({path.rpartition(".")[2] for path in wanted})
    found = {p for p in modules if any(ends_with(p, name) for name in names)}
    return names if found == set(wanted) else wanted


def _base_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The adaptable modules of the base model, by their path in the model without adapters."""
    named = model.named_modules()
    return {p.removesuffix(".base_layer"): m for p, m in named if is_adaptable(m) and not _is_part_of_adapter(p)}


def _is_part_of_adapter(path: str) -> bool:
    return any(part in path for part in (".lora_A.", ".lora_B.", ".modules_to_save.", ".original_module"))


def parse_config(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the content of the adapter_config.json at `path`.

    Raises AdapterError if it is broken, of another program, or not of a LoRA adapter of a causal language model.
    """
    raw = parse_object(content, path, AdapterError)
    kind, task = raw.get("peft_type"), raw.get("task_type")
    if kind is None and not raw.keys().isdisjoint(_MLX):
        raise AdapterError(
            _(
                "{path}: this is an adapter of mlx-lm, which has a format of its own. Merge it into its base model "
                "with mlx_lm.fuse, and use the result with --model.",
                path=path,
            )
        )
    if kind != "LORA":
        raise AdapterError(
            _("{path}: peft_type is {kind}; only LoRA adapters (LORA) can be loaded.", path=path, kind=json.dumps(kind))
        )
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(
            _(
                "{path}: task_type is {task}, so the adapter belongs to a model that does not generate text. Only "
                "adapters of causal language models (CAUSAL_LM) can be loaded.",
                path=path,
                task=task,
            )
        )
    return raw


def lora_config(raw: Mapping[str, Any], path: Path) -> LoraConfig:
    """Convert PEFT's adapter_config.json, read from `path`, to a LoraConfig.

    Raises AdapterError that names every unsupported option, or every invalid value.
    """
    flags = VARIANTS.keys() & LoraConfig.model_fields.keys()
    refused = sorted(key for key, value in raw.items() if value and key not in _SUPPORTED | flags)
    init = raw.get("init_lora_weights", True)
    if init not in _NEUTRAL_INITS:
        refused.append(f"init_lora_weights={init}")
    if refused:
        raise AdapterError(
            _(
                "{path}: unsupported PEFT options: {keys}. Ignoring them would change the model's answers.",
                path=path,
                keys=", ".join(refused),
            )
        )
    _refuse_odd_indices(raw.get("trainable_token_indices"), path)
    known = {key: raw.get(key, default) for key, default in PEFT_DEFAULTS.items()}
    known |= {key: raw[key] for key in flags if raw.get(key) is not None}
    targets, layers = raw.get("target_modules") or (), raw.get("layers_to_transform")
    named = raw.get("target_parameters") or ()
    try:
        return LoraConfig.model_validate(
            {
                **known,
                "use_rslora": known["use_rslora"] or False,  # PEFT accepts null for false
                "target_modules": sorted(targets, key=str) if isinstance(targets, list) else targets,
                "target_parameters": sorted(named, key=str) if isinstance(named, list) else named,
                "exclude_modules": raw.get("exclude_modules") or None,
                "layers_to_transform": [layers] if isinstance(layers, int) else layers,
                "rank_pattern": raw.get("rank_pattern") or {},
                "alpha_pattern": raw.get("alpha_pattern") or {},
                "modules_to_save": raw.get("modules_to_save") or (),
                "init_lora_weights": "gaussian" if init == "gaussian" else "default",
            }
        )
    except ConfigError as error:
        raise AdapterError(*(f"{path}: {text}" for text in error.problems)) from None


def _refuse_odd_indices(value: Any, path: Path) -> None:
    """Raise AdapterError unless `value` can be PEFT's trainable_token_indices: token ids, or these by module."""
    parts = list(value.values()) if isinstance(value, dict) else [value or []]
    if all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in parts):
        return
    raise AdapterError(
        _(
            "{path}: trainable_token_indices must be a list of token ids, or such a list for each module, but is "
            "{found}.",
            path=path,
            found=json.dumps(value),
        )
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
