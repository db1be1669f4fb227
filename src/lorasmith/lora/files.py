"""An adapter folder in PEFT's format, both ways, plus opaque extra files. PEFT and vLLM read what is written here."""

import json
import math
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
from lorasmith.i18n import _
from lorasmith.lora.inject import PEFT_PREFIX, Adapter, inject, remove
from lorasmith.lora.layer import LoRALayer, known_update
from lorasmith.lora.merge import plain_name
from lorasmith.lora.router import Router
from lorasmith.lora.target import ends_with, is_adaptable
from lorasmith.lora.variant import VARIANTS, flags_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What PEFT takes where adapter_config.json does not say: not what LoraConfig here takes, whose lora_alpha is 16.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
_UNDERSTOOD = {  # by this program, or without influence on the answers; any other option that is set is refused
    *PEFT_DEFAULTS, "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
    "modules_to_save", "init_lora_weights", "peft_type", "task_type", "base_model_name_or_path", "inference_mode",
    "auto_mapping", "peft_version", "revision", "fan_in_fan_out", "layers_pattern", "megatron_core", "runtime_config",
    "eva_config", "qalora_group_size",
}  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: those that leave W as it is


def save_adapter(
    adapter: Adapter, model: PreTrainedModel, folder: Path, base: str, extras: Mapping[str, str] | None = None
) -> None:
    """Write `adapter` into `folder` (made if it is not there): PEFT's two files and `extras`, name -> text.

    Raises AdapterError where it adds to a layer what no variant in the table adds.
    """
    for path in adapter.targets.adapted:
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALayer):
            known_update(layer, adapter.name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: p.detach().cpu().clone().contiguous() for key, p in adapter.parameters.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(
        json.dumps(peft_config(adapter, model, base), indent=2, sort_keys=True) + "\n", "utf-8"
    )
    for name, text in (extras or {}).items():
        (folder / name).write_text(text, "utf-8")


def peft_config(adapter: Adapter, model: PreTrainedModel, base: str) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.14 and later read it."""
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
        "exclude_modules": None,  # what it excluded is already out of target_modules
        "inference_mode": True,
    }


def _peft_targets(adapter: Adapter, model: PreTrainedModel) -> str | list[str]:
    """The shortest form that PEFT matches to the very same modules: the expression, last names, or whole paths."""
    wanted, value = adapter.targets.adapted, adapter.config.target_modules
    filtered = adapter.config.exclude_modules or adapter.config.layers_to_transform is not None
    if isinstance(value, str) and value != "all-linear" and not is_name(value) and not filtered:
        return value
    names = sorted({path.rpartition(".")[2] for path in wanted})
    found = {p for p, m in _base_modules(model).items() if any(ends_with(p, name) for name in names)}
    return names if found == set(wanted) else wanted


def _base_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules under the paths that the base alone has."""
    named = model.named_modules()
    return {p.removesuffix(".base_layer"): m for p, m in named if is_adaptable(m) and not _is_part_of_adapter(p)}


def _is_part_of_adapter(path: str) -> bool:
    return any(part in path for part in (".lora_A.", ".lora_B.", ".modules_to_save.", ".original_module"))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder. Raises AdapterError where it is missing, broken or not LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            _("{folder} is not an adapter folder: it does not contain {name}.", folder=folder, name=CONFIG)
        )
    return parse_config(path.read_bytes(), path)


def parse_config(content: bytes, path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json, which was read from `path`. Raises AdapterError as `read_config` does."""
    raw = parse_object(content, path, AdapterError)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(_("{path}: peft_type is not LORA; only LoRA adapters can be loaded.", path=path))
    return raw


def lora_config(raw: Mapping[str, Any], path: Path) -> LoraConfig:
    """A LoraConfig from PEFT's adapter_config.json, which is at `path`.

    Raises:
        AdapterError: an option that is not supported, or a wrong value; all of them, by name.
    """
    flags = VARIANTS.keys() & LoraConfig.model_fields.keys()
    refused = sorted(key for key, value in raw.items() if value and key not in _UNDERSTOOD | flags)
    init = raw.get("init_lora_weights", True)
    if init not in _STARTS:
        refused.append(f"init_lora_weights={init}")
    if refused:
        raise AdapterError(
            _(
                "{path}: unsupported PEFT options: {keys}. Ignoring them would change the model's answers.",
                path=path,
                keys=", ".join(refused),
            )
        )
    known = {key: raw.get(key, default) for key, default in PEFT_DEFAULTS.items()}
    known |= {key: raw[key] for key in flags if raw.get(key) is not None}
    targets, layers = raw.get("target_modules") or (), raw.get("layers_to_transform")
    try:
        return LoraConfig.model_validate(
            {
                **known,
                "use_rslora": known["use_rslora"] or False,  # null means no there
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, under PEFT's keys. Raises AdapterError; pickled weights are refused."""
    return parse_weights(weights_file(folder).read_bytes(), folder / WEIGHTS)


def weights_file(folder: Path) -> Path:
    """Where the weights of an adapter folder are. Raises AdapterError where there are none, or a pickle."""
    path = folder / WEIGHTS
    if not path.is_file():
        hint = ""
        if (folder / "adapter_model.bin").is_file():
            hint = " " + _(
                "adapter_model.bin is a pickle file, which can run code when it is loaded; convert it to "
                "safetensors with PEFT first."
            )
        raise AdapterError(_("{folder} does not contain {name}.", folder=folder, name=WEIGHTS) + hint)
    return path


def parse_weights(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that was read from `path`, in memory of their own. Raises AdapterError."""
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that torch does not have
        raise AdapterError(_("{path}: not a valid safetensors file: {error}", path=path, error=error)) from None


def weights_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, from its beginning alone. Raises AdapterError."""
    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(_("{path}: not a valid safetensors file: {error}", path=path, error=error)) from None


def load_adapter(model: PreTrainedModel, router: Router, folder: Path, name: str = "default") -> Adapter:
    """Put the adapter of `folder` on `model`, under `name`, and make it the active one.

    Raises:
        AdapterError: keys missing, unknown or of another shape (all listed), targets that this base does not have, or
            an adapter that changes nothing.
    """
    return put_adapter(
        model, router, lora_config(read_config(folder), folder / CONFIG), read_weights(folder), folder, name
    )


def put_adapter(
    model: PreTrainedModel, router: Router, config: LoraConfig, tensors: Mapping[str, Tensor], folder: Path, name: str
) -> Adapter:
    """The same with what was read from `folder`, which is named in errors."""
    tensors, before = dict(tensors), router.active
    try:
        adapter = inject(model, config, router, name, strict=False)
    except ConfigError as error:
        raise AdapterError(*(f"{folder / CONFIG}: {problem}" for problem in error.problems)) from None
    problems = _without_base(tensors, adapter, model)
    problems += misfits(adapter.parameters, tensors)
    problems = problems or useless(tensors)
    if problems:
        remove(model, name)
        router.active = before
        raise AdapterError(*(f"{folder / WEIGHTS}: {problem}" for problem in problems))
    with torch.no_grad():
        for key, parameter in adapter.parameters.items():
            parameter.copy_(tensors[key])
    return adapter


def _without_base(tensors: dict[str, Tensor], adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """Take out the base's own tensors, which PEFT saves too where an embedding is adapted. Problems if they differ."""
    named = {PEFT_PREFIX + n: p for n, p in model.named_parameters(remove_duplicate=False) if plain_name(n)}
    problems = []
    for key in sorted((tensors.keys() & named.keys()) - adapter.parameters.keys()):
        theirs, ours = tensors.pop(key), named[key].cpu()
        if ours.shape != theirs.shape or not (
            torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
        ):
            problems.append(
                _("{key} differs from that of this base model: the adapter belongs to another one.", key=key)
            )
    return problems


def misfits(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the keys and shapes of an adapter's tensors."""
    problems = []
    for text, keys in (
        (
            _("missing {keys}: the adapter belongs to another base model, or the file is incomplete."),
            sorted(wanted.keys() - tensors.keys()),
        ),
        (_("unexpected {keys}: this base model has no such modules."), sorted(tensors.keys() - wanted.keys())),
    ):
        if keys:
            problems.append(text.format(keys=_some(keys)))
    for key in sorted(wanted.keys() & tensors.keys()):
        if wanted[key].shape != tensors[key].shape:
            found, need = tuple(tensors[key].shape), tuple(wanted[key].shape)
            problems.append(
                _("{key} has the shape {found}, but this base model needs {need}.", key=key, found=found, need=need)
            )
    return problems


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else _("{first} and {more} more keys", first=keys[0], more=len(keys) - 1)


def useless(tensors: Mapping[str, Tensor]) -> list[str]:
    """Why these tensors of an adapter file can do nothing good, in words; empty where they can."""
    if odd := sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point()):
        found = str(tensors[odd[0]].dtype).removeprefix("torch.")
        text = _("{key} holds {found}; an adapter's matrices hold floating-point numbers, such as float32.", key=odd[0],
                 found=found)  # fmt: skip
        return [text]
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        return [_("{key} contains NaN or infinity: the training diverged, or the file is damaged.", key=broken[0])]
    if not has_effect(tensors):
        return [_("all B matrices are zero, so the adapter changes nothing: this file holds no trained weights.")]
    return []


def has_effect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's tensors, under PEFT's keys, change anything: A and B not zero, or a whole module.

    What a variant has beside A and B says nothing: it does not start at zero.
    """
    pairs = [(key, key.replace("lora_B.", "lora_A.")) for key in tensors if ".lora_B." in key]
    pairs += [(key, key[:-1] + "B") for key in tensors if key.endswith("lora_embedding_A")]
    if any(key for key in tensors if ".lora_" not in key):
        return True  # a module trained whole, or a bias
    sizes = ([float(tensors[key].detach().float().abs().sum()) for key in pair if key in tensors] for pair in pairs)
    return any(all(math.isfinite(size) and size > 0 for size in pair) for pair in sizes)
