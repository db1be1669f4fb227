"""What PEFT makes of target_modules and modules_to_save: options that mean the same there, and those of its files here.

PEFT looks at all modules, also at those that cannot have LoRA, and fails if a name matches one of them. Names in
modules_to_save match the end of a path as text: ["norm"] means every module whose name ends with norm.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lorasmith.config.lora import LoraConfig, is_name
from lorasmith.lora.expressions import ends_with, full_match, match
from lorasmith.lora.inject import PEFT_PREFIX, Adapter
from lorasmith.lora.target import ALL_LINEAR


def selected_by_peft(targets: str | Iterable[str], saved: Iterable[str], paths: Iterable[str]) -> set[str]:
    """The modules among `paths` to which PEFT adds LoRA, as check_target_module_exists in PEFT 0.21.2 does.

    saved: modules_to_save, inside of which there is none.
    """
    whole = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in saved]
    if isinstance(targets, str):
        found = {path for path in paths if full_match(targets, path)}
    else:
        exact, ends = set(targets), tuple(f".{name}" for name in targets)
        found = {path for path in paths if path in exact or path.endswith(ends)}
    return {path for path in found if not any(name.match(path) for name in whole)}


def saved_by_peft(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The modules among `paths` that PEFT trains in full for these names in modules_to_save."""
    ends = tuple(names)
    return [path for path in paths if (PEFT_PREFIX + path).endswith(ends)]


def modules_to_save_of(adapter: Adapter, paths: Collection[str]) -> list[str] | None:
    """The value of modules_to_save with which PEFT saves what `adapter` trains in full, as short as possible."""
    wanted = [path for found in adapter.targets.saved.values() for path in found]
    for names in (list(adapter.config.modules_to_save), wanted):
        if set(saved_by_peft(names, paths)) == set(wanted):
            return names or None
    return [PEFT_PREFIX + path for path in wanted]


def target_modules_of(adapter: Adapter, paths: Collection[str], by_weight: Collection[str] = ()) -> str | list[str]:
    """The shortest target_modules for which PEFT selects the same modules: an expression, names, or full paths.

    paths: those of all modules of the unwrapped model. by_weight: those that target_parameters names instead.
    """
    config, wanted = adapter.config, [path for path in adapter.targets.adapted if path not in by_weight]
    saved = modules_to_save_of(adapter, paths) or []
    value = config.target_modules
    filtered = config.exclude_modules or config.layers_to_transform is not None or config.last_layers is not None
    candidates: list[str | list[str]] = []
    if isinstance(value, str) and value != ALL_LINEAR and not is_name(value) and not filtered:
        candidates.append(value)
    candidates += [sorted({path.rpartition(".")[2] for path in wanted}), wanted]
    for candidate in candidates:
        if selected_by_peft(candidate, saved, paths) == set(wanted):
            return candidate
    return "|".join(map(re.escape, wanted))  # a path is also the end of another one


def fitted(config: LoraConfig, raw: Mapping[str, Any], paths: Sequence[str], keys: Collection[str]) -> LoraConfig:
    """The options of an adapter that was read, as they apply to a model whose modules have these paths.

    raw: adapter_config.json. keys: those of its tensors, as PEFT writes them.
    """
    changes: dict[str, Any] = {}
    alike = saved_by_peft(config.modules_to_save, paths)
    more = [path for path in alike if not any(ends_with(path, name) for name in config.modules_to_save)]
    if any(key.startswith(f"{PEFT_PREFIX}{path}.") for path in more for key in keys):
        changes["modules_to_save"] = tuple(alike)
    layers, patterns = config.layers_to_transform, raw.get("layers_pattern")
    if layers and patterns and not isinstance(config.target_modules, str):
        found = selected_by_peft(config.target_modules, config.modules_to_save, paths)
        at = {path: _layer_number(path, [patterns] if isinstance(patterns, str) else patterns) for path in found}
        changes["target_modules"] = tuple(path for path in paths if at.get(path) in layers)
        changes["layers_to_transform"] = None
    return config.model_copy(update=changes) if changes else config


def _layer_number(path: str, patterns: Iterable[str]) -> int | None:
    """The number after the first of these names, from layers_pattern, in the path."""
    found = (match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns)
    return next((int(number[1]) for number in found if number), None)
