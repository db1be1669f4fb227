"""The keys of an adapter's tensors: PEFT's own, and those that other tools write.

PEFT names a tensor base_model.model.PATH.lora_A.weight, where PATH is the module in the base model. Other programs, and
state dicts that were saved without PEFT, leave out the prefix, keep the name of the adapter (lora_A.default.weight) or
the wrappers of torch.compile, FSDP and DDP, or come from a model with one level more or less, such as a model for text
and images. A key is read if there is one module only that it can mean.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from lorasmith.errors import AdapterError
from lorasmith.i18n import _, listed
from lorasmith.lora.inject import PEFT_PREFIX

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}  # at any place
_OUTER = {"base_model", "model", "module", "language_model", "text_model"}  # at the beginning, in any number
_INNER = ("modules_to_save", "original_module", "base_layer", "token_adapter")  # PEFT's, after the path of the module


def peft_keys(tensors: Mapping[str, Tensor], paths: Collection[str], model_prefix: str) -> dict[str, Tensor]:
    """The tensors by PEFT's keys. A key whose module this model lacks stays as it is.

    paths: of the modules of the unwrapped model. model_prefix: its base_model_prefix, such as "transformer".

    Raises AdapterError if a key can mean several modules, several keys mean the same tensor, or the file contains
    several adapters.
    """
    paths, names = (
        dict.fromkeys(path for path in paths if path),
        {key: _adapter_name(_split(key)[1]) for key in tensors},
    )
    prefixed = all(key.startswith(PEFT_PREFIX) for key in tensors)
    if prefixed and all(_split(key.removeprefix(PEFT_PREFIX))[0] in paths and not names[key] for key in tensors):
        return dict(tensors)
    if len(several := {name for name in names.values() if name}) > 1:
        raise AdapterError(
            _(
                "the keys belong to several adapters ({names}). Save each of them in a folder of its own.",
                names=listed(sorted(several)),
            )
        )
    outer, by_core = _OUTER | {model_prefix}, defaultdict[str, list[str]](list)
    for path in paths:
        by_core[_core(path, outer)].append(path)
    found, sources, problems = dict[str, Tensor](), dict[str, str](), list[str]()
    for key, tensor in tensors.items():
        path, part = _split(".".join(name for name in key.split(".") if name not in _WRAPPERS))
        meant = next(([p] for p in _shorter(path) if p in paths), by_core.get(_core(path, outer), []))
        own = f"{PEFT_PREFIX}{meant[0]}.{_without_adapter_name(part)}" if meant else key
        if len(meant) > 1:
            problems.append(_("{key} can mean {paths} in this model.", key=key, paths=listed(sorted(meant))))
        elif own in sources:
            text = _("{first} and {second} are the same tensor of this model.", first=sources[own], second=key)
            problems.append(text)
        found[own], sources[own] = tensor, key
    if problems:
        raise AdapterError(*problems)
    return found


def _split(key: str) -> tuple[str, str]:
    """The path of the module in a key, and the part after it."""
    parts = key.split(".")
    inner = (i for i, part in enumerate(parts) if part.startswith("lora_") or part in _INNER)
    at = next(inner, len(parts) - 1)
    return ".".join(parts[:at]), ".".join(parts[at:])


def _adapter_name(part: str) -> str | None:
    """The name of the adapter in the part of a key after the module, or None."""
    match part.split("."):
        case ["base_layer", *rest] if rest != ["weight"]:  # of an adapter on several tensors of one module
            return _adapter_name(".".join(rest))
        case ["lora_A" | "lora_B", name, _] | ["lora_embedding_A" | "lora_embedding_B", name]:
            return name
        case ["lora_magnitude_vector", name, *_] if name != "weight":
            return name
        case ["modules_to_save", name, _, *_] | ["token_adapter", "trainable_tokens_delta", name]:
            return name
    return None


def _without_adapter_name(part: str) -> str:
    """`lora_A.default.weight` as `lora_A.weight`, and so on, as PEFT saves it."""
    names, name = part.split("."), _adapter_name(part)
    if names[0] == "lora_magnitude_vector":
        return names[0]
    if name is not None:
        names.reverse()  # the name may also be that of another part, which is before it
        names.remove(name)
        names.reverse()
    return ".".join(names).removeprefix("modules_to_save." if name is not None else "")


def _shorter(path: str) -> Iterator[str]:
    """The path as PEFT means it, as it is, and without what wrappers put before it."""
    yield path.removeprefix(PEFT_PREFIX)
    yield path
    while path.partition(".")[0] in ("base_model", "model", "module"):
        path = path.partition(".")[2]
        yield path


def _core(path: str, outer: Collection[str]) -> str:
    """The path without the names at its beginning that depend on how the model is wrapped."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part not in outer), len(parts) - 1)
    return ".".join(parts[at:])
