"""adapter_config.json, the options of an adapter in PEFT's format: parsing it, and writing it."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasmith.config.files import parse_object
from lorasmith.config.lora import OTHER_STARTS, LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.inject import Adapter, module_paths
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.peft_parameters import named_by_weight, parameter_options, whole
from lorasmith.lora.peft_targets import modules_to_save_of, target_modules_of
from lorasmith.lora.token_rows import peft_token_indices
from lorasmith.lora.variant import VARIANTS, flags_of, variant_of

ADAPTER_CONFIG = "adapter_config.json"
# PEFT's defaults for options missing from adapter_config.json. Our own LoraConfig differs: its lora_alpha is 16.
# They are the same in every version that has the option: one that an older file lacks did not exist, and is off.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
_SUPPORTED = {  # implemented here, or without influence on the output; any other option that is set is rejected
    *PEFT_DEFAULTS, "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    "modules_to_save", "init_lora_weights", "peft_type", "task_type", "base_model_name_or_path", "inference_mode",
    "auto_mapping", "peft_version", "revision", "fan_in_fan_out", "layers_pattern", "megatron_core", "runtime_config",
    "eva_config", "qalora_group_size", "trainable_token_indices", "merge_weights", "target_parameters", "velora_config",
    "loftq_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_MERGED_BY_PEFT = {"layer_replication", "kasa_config", "use_bdlora", "monteclora_config", "ensure_weight_tying"}
_TIED = ("embed", "wte", "head", "output")  # parts of the names of embeddings and heads
_MLX = {"fine_tune_type", "lora_parameters", "lora_layers"}  # options of mlx-lm in a file of the same name
_PEFT_STARTS = {"default": True, "random": False, "loftq": True}  # where PEFT's name is another one; LoftQ's changes W


def peft_config(adapter: Adapter, model: PreTrainedModel, base: str) -> dict[str, Any]:
    """The content of adapter_config.json, as PEFT 0.14 and later read it."""
    config, layers = variant_of(adapter.config).saved_config(adapter.config), dict(model.named_modules())
    paths, by_weight = module_paths(model), named_by_weight(adapter, model)
    first = next((layers[p] for p in adapter.targets.adapted), None)
    own = config.model_dump(include={*PEFT_DEFAULTS, "rank_pattern", "alpha_pattern", *flags_of(config)})
    return own | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "lora_alpha": whole(config.lora_alpha),
        "target_modules": target_modules_of(adapter, paths, by_weight),
        "modules_to_save": modules_to_save_of(adapter, paths),
        "init_lora_weights": _PEFT_STARTS.get(config.init_lora_weights, config.init_lora_weights),
        "fan_in_fan_out": isinstance(first, LoRALayer) and isinstance(first.base_layer, Conv1D),
        "exclude_modules": None,  # already applied to target_modules
        "trainable_token_indices": peft_token_indices(model, adapter.tokens),
        "inference_mode": True,
        **parameter_options(adapter, model),
    }


MAX_TARGETS, MAX_ITEMS = 100_000, 10_000  # entries of target_modules, and of other options


def parse_config(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the content of the adapter_config.json at `path`.

    Raises AdapterError if it is broken, of another program, or not of a LoRA adapter of a causal language model.
    """
    raw = parse_object(content, path, AdapterError)
    kind, task = raw.get("peft_type"), raw.get("task_type")
    if kind is None and not raw.keys().isdisjoint(_MLX):
        raise AdapterError(
            _(
                "{path}: this is an adapter of mlx-lm, which has a format of its own. Convert it with: lorasmith "
                "import {folder} --output NEW",
                path=path,
                folder=path.parent,
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
    for key, value in raw.items():
        most = MAX_TARGETS if key == "target_modules" else MAX_ITEMS
        if isinstance(value, list | dict) and len(value) > most:
            raise AdapterError(
                _(
                    "{path}: {key} has {count:,} entries; at most {most:,} are allowed.",
                    path=path,
                    key=key,
                    count=len(value),
                    most=most,
                )
            )
    return raw


def lora_config(raw: Mapping[str, Any], path: Path, keys: Collection[str] = ()) -> LoraConfig:
    """Convert PEFT's adapter_config.json, read from `path`, to a LoraConfig.

    keys: of the adapter's tensors, which say what is adapted if the file does not.

    Raises AdapterError that names every unsupported option, or every invalid value.
    """
    flags = VARIANTS.keys() & LoraConfig.model_fields.keys()
    refused = sorted(key for key, value in raw.items() if key not in _SUPPORTED | flags and not _is_off(value))
    if "ensure_weight_tying" in refused and not _may_touch_tied_weights(raw):
        refused.remove("ensure_weight_tying")
    init = raw.get("init_lora_weights", True)
    if init == "loftq":
        raise AdapterError(
            _(
                "{path}: init_lora_weights is 'loftq', so PEFT replaced the weights of the base model by quantized "
                "ones when it added this adapter, and its folder does not contain them. Merge the adapter in the "
                "program that trained it (merge_and_unload), and use the result with --model.",
                path=path,
            )
        )
    if init in OTHER_STARTS or str(init).startswith("pissa_niter_"):
        raise AdapterError(
            _(
                "{path}: init_lora_weights is {init!r}, so the adapter belongs to a changed base model that its folder "
                "does not contain. Convert it to plain LoRA where it was trained: in PEFT, with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
                path=path,
                init=init,
            )
        )
    if refused:
        raise AdapterError(_unsupported(refused, path))
    _refuse_odd_indices(raw.get("trainable_token_indices"), path)
    known = {key: raw.get(key, default) for key, default in PEFT_DEFAULTS.items()}
    known |= {key: raw[key] for key in flags if raw.get(key) is not None}
    named = raw.get("target_parameters") or ()
    targets, layers = raw.get("target_modules") or (() if named else _names_in(keys)), raw.get("layers_to_transform")
    _refuse_odd_patterns(raw.get("layers_pattern"), path)
    try:
        return LoraConfig.model_validate(
            {
                **known,
                "use_rslora": known["use_rslora"] or False,  # PEFT accepts null for false
                "target_modules": sorted(targets, key=str) if isinstance(targets, list) else targets,
                "target_parameters": sorted(named, key=str) if isinstance(named, list) else named,
                "exclude_modules": raw.get("exclude_modules") or None,
                "layers_to_transform": [layers] if isinstance(layers, int) else layers or None,
                "rank_pattern": raw.get("rank_pattern") or {},
                "alpha_pattern": raw.get("alpha_pattern") or {},
                "modules_to_save": raw.get("modules_to_save") or (),
                "init_lora_weights": "default" if init is None else init,
            }
        )
    except ConfigError as error:
        raise AdapterError(*(f"{path}: {text}" for text in error.problems)) from None


def _unsupported(keys: list[str], path: Path) -> str:
    """The message about options that are not supported, with what to do."""
    text = _(
        "{path}: unsupported PEFT options: {keys}. Ignoring them would change the model's answers.",
        path=path,
        keys=", ".join(keys),
    )
    if set(keys) <= _MERGED_BY_PEFT:
        return f"{text} " + _(
            "Merge the adapter into its base model with PEFT (merge_and_unload), and use the result with --model."
        )
    return text


def _may_touch_tied_weights(raw: Mapping[str, Any]) -> bool:
    """Whether the adapter may change an embedding or head, which alone could be tied."""
    targets = raw.get("target_modules")
    names = [str(name).lower() for name in targets] if isinstance(targets, list) else ["embed"]
    changed = raw.get("modules_to_save") or raw.get("trainable_token_indices")
    return bool(changed) or any(part in name for name in names for part in _TIED)


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


def _refuse_odd_patterns(value: Any, path: Path) -> None:
    """Raise AdapterError unless `value` can be PEFT's layers_pattern: names or regular expressions."""
    try:
        patterns = [value] if isinstance(value, str) else value or []
        is_fine = isinstance(patterns, list) and all(isinstance(one, str) and re.compile(one) for one in patterns)
    except re.error:
        is_fine = False
    if not is_fine:
        raise AdapterError(
            _(
                "{path}: layers_pattern must be the name of the list of layers, such as layers, but is {found}.",
                path=path,
                found=json.dumps(value),
            )
        )


def _is_off(value: Any) -> bool:
    """Whether the value of an unknown option says that it is not used. A number says something: 0 is not off."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _names_in(keys: Iterable[str]) -> list[str]:
    """The names of the modules that have LoRA, from the keys of an adapter's tensors."""
    found = (re.search(r"([^.]+)\.lora_(?:embedding_)?A", key) for key in keys)
    return sorted({match[1] for match in found if match})


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
