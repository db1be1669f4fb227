"""Selecting the modules that a LoraConfig adapts. A pattern that matches no module is an error."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasmith.config.lora import LoraConfig, is_name
from lorasmith.config.values import range_text, ranges
from lorasmith.errors import LIBRARY_ERRORS, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.expressions import by_end, ends_with, key_matches, matches, value_for
from lorasmith.lora.quantized import is_quantized, stored_weight
from lorasmith.lora.target_parameters import (
    all_experts,
    all_parameters,
    expert_parameters,
    expert_rank,
    no_such_parameter,
    refused_options,
    unsuitable_parameter,
)  # fmt: skip

ALL_LINEAR = "all-linear"
MAX_SHOWN = 20  # names of an adapter without a module that an error lists
Value = TypeVar("Value")
_LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # as PEFT finds the number of a layer in a module path
_STACK = re.compile(r"(.*?\.)(\d+)\.")  # the stack of layers that a module is in, and the number of its layer there


# PEFT 0.21.2 refuses LoRA on these modules of these models, whose fused kernels read the weight without a call.
_REFUSED_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_REFUSED_NAMES = {"out_proj", "conv1d"}


@dataclass(frozen=True)
class Targets:
    """Module paths `matched` by each pattern of target_modules, and `saved` for each name in modules_to_save.

    parameters: the paths of the parameters that are adapted directly, in the order in which the model has them, and the
    item of target_parameters that each matches, or all-linear.
    expert_rank: the rank of those of all-linear, unless rank_pattern has another one for them.
    """

    matched: dict[str, list[str]] = field(default_factory=dict)
    saved: dict[str, list[str]] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    expert_rank: int = 1

    @property
    def adapted(self) -> list[str]:
        """The paths of all modules that get an A and a B, without duplicates."""
        return list(dict.fromkeys(path for paths in self.matched.values() for path in paths))

    @property
    def by_module(self) -> dict[str, list[str]]:
        """The names of the parameters that are adapted directly, by the path of their module."""
        found: dict[str, list[str]] = {}
        for path, _dot, name in (path.rpartition(".") for path in self.parameters):
            found.setdefault(path, []).append(name)
        return found


def layer_number(path: str) -> int | None:
    """The number of the decoder layer that contains the module, or None."""
    found = _LAYER_NUMBER.match(path)
    return int(found[1]) if found else None


def describe_modules(paths: Sequence[str]) -> str:
    """A description such as `11 modules: 11 x query_key_value, layers 1, 10-19`, or up to three paths."""
    if len(paths) <= 3:
        return ", ".join(paths)
    names = Counter(path.rpartition(".")[2] for path in paths)
    kinds = ", ".join(f"{n} x {name}" for name, n in names.items())
    text = _("{count} modules: {kinds}", count=len(paths), kinds=kinds)
    numbers = [number for path in paths if (number := layer_number(path)) is not None]
    return text + (", " + _("layers {numbers}", numbers=", ".join(map(range_text, ranges(numbers)))) if numbers else "")


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRA supports this module: a linear layer with a single weight, or an embedding."""
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and not is_quantized(module):
        return _answers_as_linear(module)
    return isinstance(module, nn.Linear | Conv1D | nn.Embedding)


@torch.no_grad()
def _answers_as_linear(module: nn.Linear) -> bool:
    """Whether a Linear subclass with its own forward maps [1, I] to [1, O]. MoE routers return tuples, for example."""
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    try:
        y = module(torch.zeros(1, module.in_features, dtype=dtype, device=weight.device))
    except LIBRARY_ERRORS:
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, module.out_features)


def is_refused_by_peft(model: PreTrainedModel, path: str) -> bool:
    """Whether PEFT refuses LoRA on this module, so that it cannot load an adapter that has it."""
    return (
        getattr(getattr(model, "config", None), "model_type", "") in _REFUSED_TYPES
        and path.rpartition(".")[2] in _REFUSED_NAMES
    )


def find_targets(model: PreTrainedModel, config: LoraConfig, strict: bool = True) -> Targets:
    """The modules that `config` selects in `model`, which must be unwrapped.

    With `strict`, every pattern, name and layer that matches nothing is an error. It is off for existing adapters,
    whose files may contain such; then it is an error only if nothing is left.

    Raises ConfigError that lists every problem.
    """
    modules = dict(model.named_modules())
    problems, excluded, unmatched = list[str](), list[str](), list[tuple[str, str]]()
    ends = by_end(modules)
    saved = {name: ends.get(name, []) for name in config.modules_to_save}
    unmatched += [("lora.modules_to_save", name) for name, paths in saved.items() if not paths]
    whole = {path for paths in saved.values() for path in paths}
    in_whole = {p for p in modules if any(p == path or p.startswith(path + ".") for path in whole)}
    matched = {}
    for pattern in _patterns(config.target_modules):
        found = _matching(model, modules, ends, pattern)
        paths = [path for path in found if path not in in_whole]
        if not found:
            unmatched.append(("lora.target_modules", pattern))
        elif not paths:
            excluded.append(
                _(
                    "lora.target_modules: everything that {pattern!r} matches is already in modules_to_save",
                    pattern=pattern,
                )
            )
        paths = _in_last_layers(_filtered(paths, config, excluded), config.last_layers, modules)
        problems += _unsuitable(model, modules, pattern, paths)
        matched[pattern] = paths
    problems += _too_many_layers(config.last_layers, modules)
    parameters = _parameters(model, config, modules, strict, problems)
    parameters = {path: pattern for path, pattern in parameters.items() if path.rpartition(".")[0] not in in_whole}
    for path in [path for path in parameters if _is_weight_of_layer(path, config, modules)]:
        matched.setdefault(parameters.pop(path), []).append(path.rpartition(".")[0])
    problems += refused_options(config, list(parameters))
    targets = Targets(matched, saved, parameters, expert_rank(model, config.r) if parameters else 1)
    problems += _adapted_twice(targets)
    if strict or not (any(matched.values()) or parameters):
        shown = unmatched if strict else unmatched[:MAX_SHOWN]
        problems = [*(_no_match(option, name, modules) for option, name in shown), *excluded, *problems]
    if strict:
        problems += _unused_patterns(config, modules, [*targets.adapted, *parameters])
    if not problems and not targets.adapted and not parameters:
        problems.append(
            _(
                "lora.exclude_modules, lora.layers_to_transform and lora.last_layers exclude everything that "
                "target_modules matches"
            )
        )
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return targets


def _parameters(
    model: PreTrainedModel, config: LoraConfig, modules: dict[str, nn.Module], strict: bool, problems: list[str]
) -> dict[str, str]:
    """`Targets.parameters`; appends messages to `problems`. Without `strict`, patterns are the only filter, as in PEFT.

    all-linear stands for all experts, unless target_parameters is given.
    """
    if config.target_parameters is None:
        of_all = all_experts(modules) if ALL_LINEAR in _patterns(config.target_modules) else []
        return dict.fromkeys(_parameters_left(of_all, config, modules), ALL_LINEAR)
    found: dict[str, str] = {}
    for path in all_parameters(modules):
        pattern = next((name for name in config.target_parameters if ends_with(path, name)), None)
        found |= {} if pattern is None else {path: pattern}
    problems += [no_such_parameter(name, modules) for name in config.target_parameters if name not in found.values()]
    problems += [text for path, pattern in found.items() if (text := unsuitable_parameter(model, path, pattern))][:1]
    kept = _parameters_left(list(found), config, modules) if strict else list(found)
    return {path: found[path] for path in kept}


def _is_weight_of_layer(path: str, config: LoraConfig, modules: dict[str, nn.Module]) -> bool:
    """Whether LoRA on the parameter at `path` is the same as LoRA on its module, in PEFT's files too."""
    module, _dot, name = path.rpartition(".")
    own = {
        (value_for(config.rank_pattern, p, config.r), value_for(config.alpha_pattern, p, 0.0)) for p in (path, module)
    }
    is_layer = name == "weight" and isinstance(modules[module], nn.Linear) and is_adaptable(modules[module])
    return is_layer and len(own) == 1


def _parameters_left(paths: list[str], config: LoraConfig, modules: Iterable[str]) -> list[str]:
    """The paths of parameters that exclude_modules, layers_to_transform and last_layers leave."""
    for pattern in _patterns(config.exclude_modules or ()):
        paths = [p for p in paths if not (matches(p, pattern) or matches(p.rpartition(".")[0], pattern))]
    if config.layers_to_transform is not None:
        paths = [p for p in paths if layer_number(p) in config.layers_to_transform]
    return _in_last_layers(paths, config.last_layers, modules)


def _adapted_twice(targets: Targets) -> list[str]:
    """A message if a module with an adapted parameter has LoRA itself, or contains a layer that has."""
    twice = ((path, module, one) for path, module in ((p, p.rpartition(".")[0]) for p in targets.parameters)
             for one in targets.adapted if f"{one}.".startswith(f"{module}."))  # fmt: skip
    text = _("lora.target_parameters: {path} belongs to {module}, and LoRA is also added to {layer}. Name only one of "
             "the two.")  # fmt: skip
    return [text.format(path=path, module=module, layer=layer) for path, module, layer in twice][:1]


def _patterns(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value)


def _matching(
    model: PreTrainedModel, modules: dict[str, nn.Module], ends: Mapping[str, list[str]], pattern: str
) -> list[str]:
    if pattern == ALL_LINEAR:
        head = _end(model, "output")
        linear = {p: m for p, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
        linear = {p: m for p, m in linear.items() if m is not head and not is_refused_by_peft(model, p)}
        return [p for p, m in linear.items() if is_adaptable(m)]
    return ends.get(pattern, []) if is_name(pattern) else [p for p in modules if matches(p, pattern)]


def _unused_patterns(config: LoraConfig, modules: dict[str, nn.Module], adapted: list[str]) -> list[str]:
    """A message for each pattern of exclude_modules, rank_pattern and alpha_pattern that has no effect."""
    experts = all_experts(modules)
    adaptable = [path for path, module in modules.items() if is_adaptable(module)]
    adaptable += [*experts, *dict.fromkeys(path.rpartition(".")[0] for path in experts), *adapted]
    problems = [
        _no_match("lora.exclude_modules", pattern, modules)
        for pattern in _patterns(config.exclude_modules or ())
        if not any(matches(path, pattern) for path in adaptable)
    ]
    for option, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in keys:
            if not any(key_matches(key, path) for path in adaptable):
                problems.append(_no_match(f"lora.{option}", key, modules))
            elif adapted and not any(key_matches(key, path) for path in adapted):
                text = _(
                    "lora.{option}: {key!r} matches none of the modules in target_modules.", option=option, key=key
                )
                problems.append(text)
    return problems


def _filtered(paths: list[str], config: LoraConfig, unmatched: list[str]) -> list[str]:
    """The paths that exclude_modules and layers_to_transform leave; appends messages to `unmatched`."""
    for pattern in _patterns(config.exclude_modules or ()):
        paths = [p for p in paths if not matches(p, pattern)]
    if config.layers_to_transform is None:
        return paths
    numbers = {path: number for path in paths if (number := layer_number(path)) is not None}
    absent = sorted(set(config.layers_to_transform) - set(numbers.values()))
    if absent and numbers:
        unmatched.append(
            _(
                "lora.layers_to_transform: layer {absent} does not exist; this model has layers {low} to {high}.",
                absent=", ".join(map(str, absent)),
                low=min(numbers.values()),
                high=max(numbers.values()),
            )
        )
    return [path for path, number in numbers.items() if number in config.layers_to_transform]


def _stack_sizes(modules: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack, such as {'model.layers.': 12}."""
    sizes: dict[str, int] = {}
    for stack, number in (found.groups() for path in modules if (found := _STACK.match(path))):
        sizes[stack] = max(sizes.get(stack, 0), int(number) + 1)
    return sizes


def _in_last_layers(paths: list[str], last: int | None, modules: Iterable[str]) -> list[str]:
    """The paths that are in the last layers of a stack; all of them if `last` is None."""
    if last is None:
        return paths
    sizes, found = _stack_sizes(modules), {path: _STACK.match(path) for path in paths}
    return [path for path, at in found.items() if at and int(at[2]) >= sizes[at[1]] - last]


def _too_many_layers(last: int | None, modules: Iterable[str]) -> list[str]:
    """A message if no stack of the model has as many layers as lora.last_layers asks for."""
    most = max(_stack_sizes(modules).values(), default=0)
    if last is None or last <= most:
        return []
    return [_("lora.last_layers: {last} layers are asked for, but this model has only {most}.", last=last, most=most)]


def _unsuitable(model: PreTrainedModel, modules: dict[str, nn.Module], pattern: str, paths: list[str]) -> list[str]:
    problems, named = [], set[type]()  # one module of a kind is named: the others are the same in other layers
    for path in paths:
        kind = type(modules[path])
        if kind in named:
            continue
        if stacked := expert_parameters(modules[path]):
            named.add(kind)
            problems.append(_stacked(pattern, path, modules[path], stacked))
        elif not is_adaptable(modules[path]):
            named.add(kind)
            problems.append(
                _(
                    "lora.target_modules: {pattern!r} matches {path}, a {kind}, but LoRA supports only Linear, "
                    "Conv1D and Embedding. Name the modules inside it.",
                    pattern=pattern,
                    path=path,
                    kind=kind.__name__,
                )
            )
        elif not is_name(pattern) and pattern != ALL_LINEAR and is_tied(model, modules[path]):
            problems.append(
                _(
                    "lora.target_modules: the expression {pattern!r} also matches {path}, whose weight is tied "
                    "to that of another module. To adapt it, give it in a list of names; otherwise exclude it.",
                    pattern=pattern,
                    path=path,
                )
            )
    return problems


def _stacked(pattern: str, path: str, module: nn.Module, stacked: Sequence[str]) -> str:
    """Why LoRA cannot be added to experts, and what can be done."""
    return _(
        "lora.target_modules: {pattern!r} matches {path}, a {kind}, whose weights are not linear layers but tensors of "
        "all experts together ({names}). Name these in lora.target_parameters, or use all-linear, which includes "
        "them.",
        pattern=pattern,
        path=path,
        kind=type(module).__name__,
        names=", ".join(stacked),
    )


def _end(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """The input or output embedding. None if there is none, as in a module that is no model of transformers."""
    get: Any = getattr(model, f"get_{which}_embeddings", None)
    return get() if get else None


def is_tied(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether the module is the input embedding or output head and the two share their weight."""
    ends = [_end(model, "input"), _end(model, "output")]
    if None in ends or not any(module is end for end in ends):
        return False
    first, second = (stored_weight(end) for end in ends if end is not None)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return first is second
    return first is second or (first.data_ptr() == second.data_ptr() != 0)


def _no_match(key: str, pattern: str, modules: dict[str, nn.Module]) -> str:
    for path, module in modules.items():
        if key == "lora.target_modules" and any(
            matches(f"{path}.{name}", pattern) for name in expert_parameters(module)
        ):
            return _stacked(pattern, path, module, expert_parameters(module))
    names = list(dict.fromkeys(p.rpartition(".")[2] for p, m in modules.items() if is_adaptable(m)))
    text = _(
        "{key}: {pattern!r} matches no module; this model has {names}.",
        key=key,
        pattern=pattern,
        names=", ".join(names),
    )
    close = difflib.get_close_matches(pattern, names, n=1)
    if close:
        return text + " " + _("Did you mean {close!r}?", close=close[0])
    if not is_name(pattern):
        return text + " " + _("An expression must match the whole path, such as {path!r}.", path=_example_path(modules))
    return text


def _example_path(modules: dict[str, nn.Module]) -> str:
    return next((p for p, m in modules.items() if isinstance(m, nn.Linear | Conv1D)), "")
