"""Check the files of a model folder against its config.json, and turn errors of transformers into sentences.

transformers passes on whatever its dependencies raise, and silently ignores weights that the config has no place for.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lorasmith.config.files import read_object
from lorasmith.errors import LIBRARY_ERRORS, ModelError, first_line
from lorasmith.i18n import _, listed

CONFIG = "config.json"
LOAD_ERRORS = (*LIBRARY_ERRORS, SafetensorError, StrictDataclassError)  # what transformers raises for a model folder
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.*)")  # the list of layers, the index of a layer, a tensor in it
_ATTENTION = ("attn_implementation", "_attn_implementation")
_BITSANDBYTES = ("bitsandbytes", "accelerate")  # packages that transformers needs to load weights quantized with it
_LOADABLE = ("bitsandbytes", "mxfp4")  # the latter is dequantized by transformers
_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "n_embd", "intermediate_size", "num_hidden_layers", "n_layer", "num_attention_heads",
    "n_head", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions",
)  # fmt: skip


def config_problems(path: Path, raw: Mapping[str, Any]) -> list[str]:
    """Wrong values in a config.json that transformers accepts, or rejects without naming the key; one text each."""
    problems = []
    for key in _AT_LEAST_ONE:
        if isinstance(raw.get(key), int) and raw[key] < 1:
            problems.append(_wrong(path, key, raw[key], _("a whole number of at least 1")))
    for key in ("dtype", "torch_dtype"):
        value = raw.get(key)
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in (None, "auto") and not (isinstance(name, str) and _is_dtype(name)):
            problems.append(_wrong(path, key, value, _("a torch dtype, such as {example}", example='"bfloat16"')))
    known = (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes")
    if (quantized := raw.get("quantization_config")) is not None and quant_method(raw) not in known:
        expected = _("an object whose quant_method is one that transformers knows, such as {example}", example='"gptq"')
        problems.append(_wrong(path, "quantization_config", quantized, expected))
    return problems


def quant_method(raw: Mapping[str, Any]) -> str | None:
    """How the weights are quantized; None if they are not."""
    found = raw.get("quantization_config")
    if not isinstance(found, dict):
        return None
    is_older = found.get("load_in_4bit") or found.get("load_in_8bit")  # of bitsandbytes, which then named no method
    return found.get("quant_method", "bitsandbytes" if is_older else None)


def quantization_problems(path: Path, raw: Mapping[str, Any]) -> list[str]:
    """Why weights that were quantized by another tool cannot be loaded: not supported, or a package is missing."""
    method = quant_method(raw)
    if method is not None and method not in _LOADABLE:
        text = _(
            "{path}: the weights are quantized with {method}, on which lorasmith cannot train. Use the unquantized "
            "model; --quantize nf4 saves as much memory.",
            path=path,
            method=method,
        )
        return [text]
    missing = [package for package in _BITSANDBYTES if method == "bitsandbytes" and find_spec(package) is None]
    if not missing:
        return []
    text = _(
        "{path}: the weights are quantized ({method}), and loading them requires {packages}. Install it with: pip "
        "install {words}. Or use the unquantized model.",
        path=path,
        method=method,
        packages=listed(missing),
        words=" ".join(missing),
    )
    return [text]


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _wrong(path: Path, key: str, value: Any, expected: str) -> str:
    return _(
        "{path}: {key} is {value}; it must be {expected}.", path=path, key=key, value=_shown(value), expected=expected
    )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def load_error(folder: Path, error: Exception, settings: PretrainedConfig | None = None) -> ModelError:
    """A ModelError for what transformers raised while reading `folder`; names the file and the key if possible.

    settings: the config, if that was read already, so that reading the weights failed.
    """
    path = folder / CONFIG
    raw = read_object(path, ModelError)
    if isinstance(error, StrictDataclassError):
        cause = first_line(error.__cause__ or error)
        if isinstance(error, StrictDataclassFieldValidationError):
            return ModelError(_("{path}: a key has a value of the wrong type: {error}.", path=path, error=cause))
        return ModelError(_("{path}: its values are inconsistent: {error}", path=path, error=cause))
    if isinstance(error, KeyError) and (key := _key_of(raw, error.args[0])):
        value = _shown(error.args[0])
        return ModelError(
            _(
                "{path}: {key} is {value}, which this version of transformers does not know.",
                path=path,
                key=key,
                value=value,
            )
        )
    if isinstance(error, ImportError) and (requesting := [key for key in _ATTENTION if raw.get(key)]):
        text = _(
            "{path}: {key} requires a package that cannot be imported here: {error}",
            path=path,
            key=requesting[0],
            error=first_line(error),
        )
        return ModelError(f"{text.rstrip('.')}. " + _("Install it, or remove the key."))
    if method := quant_method(raw):
        return ModelError(
            _(
                "{path}: the weights are quantized ({method}) and cannot be loaded on this machine: {error}. Use the "
                "unquantized model.",
                path=path,
                method=method,
                error=_named(error).rstrip("."),
            )
        )
    if settings is None:
        return ModelError(
            _("{folder}: transformers does not support this model: {error}", folder=folder, error=_named(error))
        )
    problems = shape_mismatches(folder, settings)
    return ModelError(
        *problems or [_("{folder}: transformers cannot load this model: {error}", folder=folder, error=_named(error))]
    )


def _named(error: Exception) -> str:
    """The message of a library's error, after its type if the message alone says too little."""
    plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError | SafetensorError)
    return first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"


def _key_of(raw: Mapping[str, Any], value: Any) -> str | None:
    """The dotted key that has this value, or None."""
    for key, found in raw.items():
        if found == value:
            return key
        if isinstance(found, dict) and (inner := _key_of(found, value)):
            return f"{key}.{inner}"
    return None


def shape_mismatches(folder: Path, settings: PretrainedConfig) -> list[str]:
    """Tensors whose shape differs from that in a model of this config, one text each, at most 3. Reads no weights."""
    try:
        with torch.device("meta"):
            wanted = dict(AutoModelForCausalLM.from_config(settings).named_parameters())
    except LOAD_ERRORS:
        return []  # the config itself is the reason for the error
    problems = []
    for path in sorted(folder.glob("*.safetensors")):
        for name, shape in _shapes(path):
            if name in wanted and tuple(shape) != (need := tuple(wanted[name].shape)):
                problems.append(
                    _(
                        "{path}: {key} has the shape {found}; a model with this {config} needs {need}.",
                        path=path,
                        key=name,
                        found=tuple(shape),
                        config=CONFIG,
                        need=need,
                    )
                )
    return problems[:3]


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_slice(name).get_shape()
    except (OSError, SafetensorError):
        return  # transformers already reported what is wrong


def unexpected_weights(folder: Path, model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Weights that a model of this config has no place for: whole layers, or tensors of its modules. One text each.

    Other tensors in `unexpected` (an image encoder, layers that predict further tokens) are ignored, as transformers
    means to.
    """
    names, modules = sorted(unexpected), dict(model.named_modules())
    problems = []
    if layers := _extra_layers(list(model.state_dict()), names):
        problems.append(
            _(
                "{folder}: its weights contain {found} layers ({example}), but its {config} specifies {wanted}. Use "
                "the {config} that belongs to these weights.",
                folder=folder,
                found=layers[1],
                example=layers[2],
                wanted=layers[0],
                config=CONFIG,
            )
        )
    for name in () if problems else names:
        parent, _dot, kind = name.rpartition(".")
        has_own = parent in modules and any(True for _p in modules[parent].parameters(recurse=False))
        if kind in ("weight", "bias") and has_own:
            problems.append(
                _(
                    "{folder}: its weights contain {key}, which a model with this {config} does not have. Use the "
                    "{config} that belongs to these weights.",
                    folder=folder,
                    key=name,
                    config=CONFIG,
                )
            )
    return problems[:3]


def _extra_layers(own: Sequence[str], unexpected: Sequence[str]) -> tuple[int, int, str] | None:
    """Number of layers in the model and in the file, and a tensor of the first extra layer; None if there is none.

    Only layers with the same tensors as those of the model count.
    """
    parts: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for name in own:
        if found := _NUMBERED.fullmatch(name):
            parts.setdefault(found[1], set()).add(found[3])
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    extra: dict[tuple[str, int], set[str]] = {}
    for name in unexpected:
        if (found := _NUMBERED.fullmatch(name)) and int(found[2]) >= counts.get(found[1], 0):
            extra.setdefault((found[1], int(found[2])), set()).add(found[3])
    alike = {(layers, n): rest for (layers, n), rest in extra.items() if rest <= parts.get(layers, set())}
    if not alike:
        return None
    layers, first = min(alike)
    last = max(n for other, n in alike if other == layers)
    return counts.get(layers, 0), last + 1, f"{layers}.{first}.{min(alike[layers, first])}"
