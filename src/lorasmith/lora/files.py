"""Reading and writing adapters in PEFT's format: the folder, and its adapter_model.safetensors.

PEFT and vLLM can load what is written here, and folders written by PEFT can be loaded.
"""

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.config.values import range_text, ranges
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG, peft_config
from lorasmith.lora.inject import PEFT_PREFIX, Adapter, adapter_names, inject, remove
from lorasmith.lora.merge import plain_name
from lorasmith.lora.router import Router
from lorasmith.lora.saved_values import has_effect, saved_values
from lorasmith.lora.token_rows import TokenIds

ADAPTER_WEIGHTS = "adapter_model.safetensors"
UNUSED = "lora_velora_embed"  # end of keys of VeLoRA, which computes the gradients of plain LoRA otherwise
_EXPERT = re.compile(r"\.experts\.\d+\.")  # in the keys of adapters with A and B for each expert


def save_adapter(
    adapter: Adapter, model: PreTrainedModel, folder: Path, base: str, extras: Mapping[str, str] | None = None
) -> None:
    """Write `adapter` to `folder`, which is created if needed.

    `base` is written as base_model_name_or_path; `extras` maps the names of additional files to their text.

    Raises AdapterError if a layer uses an unregistered variant.
    """
    tensors = {key: p.cpu().clone().contiguous() for key, p in saved_values(adapter, model).items()}
    write_files(folder, tensors, peft_config(adapter, model, base), extras or {})


def write_files(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], extras: Mapping[str, str]) -> None:
    """Write the files of an adapter folder: tensors by PEFT's keys, adapter_config.json, `extras` as `save_adapter`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for name, text in extras.items():
        (folder / name).write_text(text, "utf-8")


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
                "adapter_model.bin is a pickle file, which can run code when it is loaded. Convert it with:\n{command}",
                command=conversion_of(folder),
            )
        raise AdapterError(_("{folder} does not contain {name}.", folder=folder, name=ADAPTER_WEIGHTS) + hint)
    return path


def conversion_of(folder: Path) -> str:
    """The command that converts the pickled weights in a folder to safetensors; code in the pickle is not run."""
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "weights = torch.load(sys.argv[1] + '/adapter_model.bin', map_location='cpu', weights_only=True); "
        "save_file({key: tensor.clone().contiguous() for key, tensor in weights.items()}, "
        f"sys.argv[1] + '/{ADAPTER_WEIGHTS}')"
    )
    return f'python -c "{code}" {shlex.quote(str(folder))}'


def parse_weights(content: bytes, path: Path) -> dict[str, Tensor]:
    """Parse the content of the safetensors file at `path`. Raises AdapterError if it is not valid."""
    try:
        return {key: tensor for key, tensor in load_tensors(content).items() if not key.endswith(UNUSED)}
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise AdapterError(_("{path}: not a valid safetensors file: {error}", path=path, error=error)) from None


def weights_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header only. Raises AdapterError."""
    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if not key.endswith(UNUSED)}  # noqa: SIM118 (not a dict)
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
    tensors = dict(tensors)
    with _undone_on_error(model, router, name):
        try:
            adapter = inject(model, config, router, name, strict=False, tokens=tokens or {})
        except ConfigError as error:
            raise AdapterError(*(f"{folder / ADAPTER_CONFIG}: {problem}" for problem in error.problems)) from None
        problems = _drop_base_weights(tensors, adapter, model)
        problems += mismatches(adapter.parameters, tensors)
        problems = problems or invalid_values(tensors)
        if problems:
            raise AdapterError(*(f"{folder / ADAPTER_WEIGHTS}: {problem}" for problem in problems))
        with torch.no_grad():
            for key, parameter in adapter.parameters.items():
                parameter.copy_(tensors[key])
    return adapter


@contextmanager
def _undone_on_error(model: PreTrainedModel, router: Router, name: str) -> Iterator[None]:
    """Remove adapter `name` again if an error is raised inside, so that the model is what it was before."""
    active, is_new = router.active, name not in adapter_names(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if is_new:
            remove(model, name)
        router.active = active
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


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
    """A message for each kind of problem with the keys and shapes of an adapter's tensors, compared with `wanted`."""
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    problems = []
    if missing:
        text = _(
            "the adapter belongs to another base model, or the file is incomplete. It lacks {keys}",
            keys=keys_text(missing),
        )
        problems.append(text)
    if unknown:
        text = _("this base model has no modules for {keys}", keys=keys_text(unknown))
        problems.append(text)
    differing = defaultdict[tuple[tuple[int, ...], tuple[int, ...]], list[str]](list)
    for key in wanted.keys() & tensors.keys():
        if wanted[key].shape != tensors[key].shape:
            differing[tuple(tensors[key].shape), tuple(wanted[key].shape)].append(key)
    for (found, need), keys in sorted(differing.items()):
        problems.append(
            _(
                "the shape is {found}, but this base model needs {need} for {keys}",
                found=found,
                need=need,
                keys=keys_text(keys),
            )
        )
    return problems


def keys_text(keys: Collection[str]) -> str:
    """A single key; several below each other, the numbers of layers and experts as ranges."""
    if len(keys) == 1:
        return next(iter(keys))
    names = sorted(keys)
    for which in (-1, 0):
        names = _with_ranges(names, which)
    return _("{count} tensors:", count=len(keys)) + "".join(f"\n  {name}" for name in names)


def _with_ranges(keys: Iterable[str], which: int) -> list[str]:
    """The keys that differ only in one number, the first (0) or the last (-1) of each, as one."""
    alike = defaultdict[tuple[str, str], list[int]](list)
    for key in keys:
        parts = key.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        at = numbers[which] if numbers else len(parts)
        alike[".".join(parts[:at]), ".".join(parts[at + 1 :])] += [int(part) for part in parts[at : at + 1]]
    texts = {pair: ", ".join(map(range_text, ranges(numbers))) for pair, numbers in alike.items()}
    return [".".join(part for part in (before, texts[before, after], after) if part) for before, after in alike]


def invalid_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Messages about values that make an adapter unusable: wrong dtype, NaN or infinity, no effect. Empty if fine."""
    odd = defaultdict[str, list[str]](list)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            odd[str(tensor.dtype).removeprefix("torch.")].append(key)
    if odd:
        return [
            _(
                "an adapter's matrices must contain floating-point numbers, such as float32, but {found} is in {keys}",
                found=found,
                keys=keys_text(keys),
            )
            for found, keys in odd.items()
        ]
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        text = _("the training diverged, or the file is damaged: NaN or infinity in {keys}", keys=keys_text(broken))
        return [text]
    if not has_effect(tensors):
        return [_("all B matrices are zero, so the adapter changes nothing: this file contains no trained weights.")]
    return []
