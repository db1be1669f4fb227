"""Reading and writing adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT and vLLM can load what is written here, and folders written by PEFT can be loaded.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasmith.config.files import parse_object
from lorasmith.config.lora import LoraConfig, is_name
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.inject import PEFT_PREFIX, Adapter, inject, remove
from lorasmith.lora.layer import LoRALayer, registered_update
from lorasmith.lora.merge import plain_name
from lorasmith.lora.router import Router
from lorasmith.lora.target import ends_with, is_adaptable
from lorasmith.lora.token_rows import TokenIds, peft_token_indices
from lorasmith.lora.variant import VARIANTS, flags_of

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's defaults for options missing from adapter_config.json. Our own LoraConfig differs: its lora_alpha is 16.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
_SUPPORTED = {  # implemented here, or without influence on the output; any other option that is set is rejected
    *PEFT_DEFAULTS, "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    "modules_to_save", "init_lora_weights", "peft_type", "task_type", "base_model_name_or_path", "inference_mode",
    "auto_mapping", "peft_version", "revision", "fan_in_fan_out", "layers_pattern", "megatron_core", "runtime_config",
    "eva_config", "qalora_group_size", "trainable_token_indices",
}  # fmt: skip
_MLX = {"fine_tune_type", "lora_parameters", "lora_layers"}  # options of mlx-lm in a file of the same name
_EXPERT = re.compile(r"\.experts\.\d+\.")  # in the keys of adapters with A and B for each expert
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that do not change W


def save_adapter(
    adapter: Adapter, model: PreTrainedModel, folder: Path, base: str, extras: Mapping[str, str] | None = None
) -> None:
    """Write `adapter` to `folder`, which is created if needed.

    `base` is written as base_model_name_or_path; `extras` maps the names of additional files to their text.

    Raises AdapterError if a layer uses an unregistered variant.
    """
    for path in adapter.targets.adapted:
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALayer):
            registered_update(layer, adapter.name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: p.detach().cpu().clone().contiguous() for key, p in adapter.parameters.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(peft_config(adapter, model, base), indent=2, sort_keys=True) + "\n", "utf-8"
    )
    for name, text in (extras or {}).items():
        (folder / name).write_text(text, "utf-8")


def peft_config(adapter: Adapter, model: PreTrainedModel, base: str) -> dict[str, Any]:
    """The content of adapter_config.json, as PEFT 0.14 and later read it."""
    config, layers = adapter.config, dict(model.named_modules())
    first = next((layers[p] for p in adapter.targets.adapted), None)
    own = config.model_dump(include={*PEFT_DEFAULTS, "rank_pattern", "alpha_pattern", *flags_of(config)})
    alpha = own["lora_alpha"]
    return own | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": _peft_targets(adapter, model),
        "modules_to_save": list(config.modules_to_save) or None,
        "init_lora_weights": True if config.init_lora_weights == "default" else "gaussian",
        "fan_in_fan_out": isinstance(first, LoRALayer) and isinstance(first.base_layer, Conv1D),
        "exclude_modules": None,  # already applied to target_modules
        "trainable_token_indices": peft_token_indices(model, adapter.tokens),
        "inference_mode": True,
    }


def _peft_targets(adapter: Adapter, model: PreTrainedModel) -> str | list[str]:
    """The shortest target_modules for which PEFT selects the same modules: an expression, names, or full paths."""
    config, wanted, modules = adapter.config, adapter.targets.adapted, _base_modules(model)
    value = config.target_modules
    filtered = config.exclude_modules or config.layers_to_transform is not None or config.last_layers is not None
    is_expression = isinstance(value, str) and value != "all-linear" and not is_name(value) and not filtered
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
    if "target_parameters" in refused:
        raise AdapterError(
            _(
                "{path}: target_parameters adapts {names}, which are not linear layers but tensors, such as those of "
                "all experts together. lorasmith cannot load such an adapter: merge it into its base model with PEFT "
                "(merge_and_unload), and use the result with --model.",
                path=path,
                names=listed(map(str, _list(raw["target_parameters"]))),
            )
        )
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
    try:
        return LoraConfig.model_validate(
            {
                **known,
                "use_rslora": known["use_rslora"] or False,  # PEFT accepts null for false
                "target_modules": sorted(targets, key=str) if isinstance(targets, list) else targets,
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder by PEFT's keys. Raises AdapterError; pickled weights are not loaded."""
    return parse_weights(weights_file(folder).read_bytes(), folder / ADAPTER_WEIGHTS)


def weights_file(folder: Path) -> Path:
    """The path of the weights in an adapter folder. Raises AdapterError if there are none, or only a pickle."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        hint = ""
        if (folder / "adapter_model.bin").is_file():
            hint = " " + _(
                "adapter_model.bin is a pickle file, which can run code when it is loaded; convert it to "
                "safetensors with PEFT first."
            )
        raise AdapterError(_("{folder} does not contain {name}.", folder=folder, name=ADAPTER_WEIGHTS) + hint)
    return path


def parse_weights(content: bytes, path: Path) -> dict[str, Tensor]:
    """Parse the content of the safetensors file at `path`. Raises AdapterError if it is not valid."""
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise AdapterError(_("{path}: not a valid safetensors file: {error}", path=path, error=error)) from None


def weights_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header only. Raises AdapterError."""
    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(_("{path}: not a valid safetensors file: {error}", path=path, error=error)) from None


def load_adapter(
    model: PreTrainedModel,
    router: Router,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    name: str,
    tokens: TokenIds | None = None,
) -> Adapter:
    """Add an adapter, read from `folder`, to `model` under `name`, and make it the active one.

    tokens: the ids of the tokens whose rows it trains, by the path of the embedding or head.

    Raises AdapterError if tensors are missing, unknown or have the wrong shape (all are listed), if this base model
    lacks the target modules, or if the adapter has no effect. The model is then unchanged.
    """
    refuse_expert_pairs(model, tensors, folder)
    tensors, before = dict(tensors), router.active
    try:
        adapter = inject(model, config, router, name, strict=False, tokens=tokens or {})
    except ConfigError as error:
        raise AdapterError(*(f"{folder / ADAPTER_CONFIG}: {problem}" for problem in error.problems)) from None
    problems = _drop_base_weights(tensors, adapter, model)
    problems += mismatches(adapter.parameters, tensors)
    problems = problems or invalid_values(tensors)
    if problems:
        remove(model, name)
        router.active = before
        raise AdapterError(*(f"{folder / ADAPTER_WEIGHTS}: {problem}" for problem in problems))
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            parameter.copy_(tensors[key])
    return adapter


def refuse_expert_pairs(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise AdapterError if the adapter has A and B for each expert, and this model has the experts in one tensor.

    So it is with adapters that were trained with transformers 4.
    """
    paths = {key.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for key in tensors if _EXPERT.search(key)}
    if missing := sorted(paths - dict(model.named_modules()).keys()):
        raise AdapterError(
            _(
                "{path}: the adapter has LoRA on each expert by itself ({example}), but in this version of "
                "transformers the experts of {kind} are not modules. Merge the adapter into its base model with the "
                "versions of PEFT and transformers that trained it, and use the result with --model.",
                path=folder / ADAPTER_WEIGHTS,
                example=missing[0],
                kind=type(model).__name__,
            )
        )


def _drop_base_weights(tensors: dict[str, Tensor], adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """Remove the base model's own weights, which PEFT saves with an adapted embedding; messages if any differ."""
    named = {PEFT_PREFIX + n: p for n, p in model.named_parameters(remove_duplicate=False) if plain_name(n)}
    problems = []
    for key in sorted((tensors.keys() & named.keys()) - adapter.parameters.keys()):
        theirs, ours = tensors.pop(key), named[key].cpu()
        if not is_same(ours, theirs):
            problems.append(
                _("{key} differs from that of this base model: the adapter belongs to another one.", key=key)
            )
    return problems


def is_same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two weights are equal in the dtype of either."""
    return ours.shape == theirs.shape and (
        torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
    )


def mismatches(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """A message for each problem with the keys and shapes of an adapter's tensors, compared with `wanted`."""
    problems = []
    for text, keys in (
        (
            _("missing {keys}: the adapter belongs to another base model, or the file is incomplete."),
            sorted(wanted.keys() - tensors.keys()),
        ),
        (_("unexpected {keys}: this base model has no such modules."), sorted(tensors.keys() - wanted.keys())),
    ):
        if keys:
            problems.append(text.format(keys=_first_of(keys)))
    for key in sorted(wanted.keys() & tensors.keys()):
        if wanted[key].shape != tensors[key].shape:
            found, need = tuple(tensors[key].shape), tuple(wanted[key].shape)
            problems.append(
                _("{key} has the shape {found}, but this base model needs {need}.", key=key, found=found, need=need)
            )
    return problems


def _first_of(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else _("{first} and {more} more keys", first=keys[0], more=len(keys) - 1)


def invalid_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Messages about values that make an adapter unusable: wrong dtype, NaN or infinity, no effect. Empty if fine."""
    if odd := sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point()):
        found = str(tensors[odd[0]].dtype).removeprefix("torch.")
        text = _("{key} contains {found}; an adapter's matrices must contain floating-point numbers, such as float32.",
                 key=odd[0], found=found)  # fmt: skip
        return [text]
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        return [_("{key} contains NaN or infinity: the training diverged, or the file is damaged.", key=broken[0])]
    if not has_effect(tensors):
        return [_("all B matrices are zero, so the adapter changes nothing: this file contains no trained weights.")]
    return []


def has_effect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's tensors, by PEFT's keys, change the model: A and B are nonzero, or a full module is trained.

    Other parameters of a variant are ignored, since they do not start at zero.
    """
    pairs = [(key, key.replace("lora_B.", "lora_A.")) for key in tensors if ".lora_B." in key]
    pairs += [(key, key[:-1] + "B") for key in tensors if key.endswith("lora_embedding_A")]
    if any(key for key in tensors if ".lora_" not in key):
        return True  # a fully trained module, or a bias
    sizes = ([float(tensors[key].detach().float().abs().sum()) for key in pair if key in tensors] for pair in pairs)
    return any(all(math.isfinite(size) and size > 0 for size in pair) for pair in sizes)
