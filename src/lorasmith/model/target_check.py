"""Find out by a trial step, before a training, which modules of an adapter the loss depends on.

LoRA on the others would never learn. There are two kinds: modules that a text does not reach, such as the image
encoder of a model for text and images, and layers whose weight the model reads to compute with it itself, as Mamba does
with `dt_proj`, so that LoRA on the layer is never called. Experts that only happen to get no token are neither: another
expert of the same layer, or the same expert of another, gets some.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorasmith.errors import LIBRARY_ERRORS, ConfigError, ModelError, first_line
from lorasmith.i18n import _, listed
from lorasmith.lora.inject import PEFT_PREFIX, Adapter, leave_out, module_paths, parameter_keys, stack_at
from lorasmith.lora.layer import SavedModule
from lorasmith.lora.peft_parameters import unreadable_in_peft
from lorasmith.lora.target import is_adaptable, is_refused_by_peft
from lorasmith.model.base import Base
from lorasmith.model.verify import trial_loss, use_fast_parts
from lorasmith.report import Report


def check_targets(base: Base, name: str, ids: Sequence[int], report: Report) -> None:
    """Try a training step of adapter `name` on these token ids, and leave modules out on which nothing depends.

    Raises:
        ConfigError: everything that a pattern matches would have to be left out.
        ModelError: the step fails with this adapter.
    """
    fast = base.fast_parts
    use_fast_parts(base, frozenset())  # the fast parts are chosen later
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):  # dropout uses it
            unreached = _unreached(base, name, ids)
            read = set(_computed_with(base, name, ids, unreached))
    finally:
        use_fast_parts(base, fast)
    if unreached:
        _refuse_useless(base, name, unreached, read)
        adapter = base.adapters[name]
        taken = [*adapter.targets.adapted, *adapter.targets.parameters]
        paths = [path for path in taken if path in set(unreached)]
        base.adapters[name] = leave_out(base.model, adapter, paths)
        weights = [path for path in paths if path in adapter.targets.parameters and path not in read]
        others = [path for path in paths if path not in read and path not in weights]
        _tell(base, [path for path in paths if path in read], others, weights, report)
    _tell_what_peft_refuses(base, base.adapters[name], report)


def _unreached(base: Base, name: str, ids: Sequence[int]) -> list[str]:
    """Paths of the adapter's modules on which the loss does not depend, in no layer."""
    adapter = base.adapters[name]
    targets, parameters = adapter.targets, adapter.trained
    try:
        loss, _tokens = trial_loss(base, name, ids)
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    except LIBRARY_ERRORS as error:
        raise ModelError(
            _(
                "{base}: a training step with LoRA on {targets} fails in this model ({error}). Choose other modules "
                "with --target-modules or --exclude-modules.",
                base=base.source,
                targets=", ".join(_last_names(targets.adapted)),
                error=f"{type(error).__name__}: {first_line(error)}",
            )
        ) from error
    learns = [key for key, gradient in zip(parameters, found, strict=True) if gradient is not None and gradient.any()]
    saved = [path for paths in targets.saved.values() for path in paths]
    stacks = parameter_keys(targets)
    reached = {stacks.get(key, key.removeprefix(PEFT_PREFIX).partition(".lora_")[0]) for key in learns}
    reached |= {path for path in saved if any(key.startswith(f"{PEFT_PREFIX}{path}.") for key in learns)}
    roles = {_role(path) for path in reached}
    return [path for path in (*targets.adapted, *targets.parameters, *saved) if _role(path) not in roles]


def _role(path: str) -> str:
    """The path without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _computed_with(base: Base, name: str, ids: Sequence[int], paths: Sequence[str]) -> list[str]:
    """Those of `paths` whose frozen weights the loss depends on, according to autograd."""
    weights: dict[str, nn.Parameter] = {}
    for path in paths:
        weight: nn.Parameter | None
        if path in base.adapters[name].targets.parameters:
            weight = stack_at(base.model, path)
        else:
            wrapper = base.model.get_submodule(path)
            frozen = wrapper.original_module if isinstance(wrapper, SavedModule) else wrapper.base_layer
            assert isinstance(frozen, nn.Module)
            weight = next(frozen.parameters(), None)  # a quantized layer has none
        weights |= {path: weight} if weight is not None and weight.is_floating_point() else {}
    if not weights:
        return []
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        loss, _tokens = trial_loss(base, name, ids)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    unseen: list[Tensor | None] = list(gradients)  # torch's annotation does not allow None
    return [path for path, gradient in zip(weights, unseen, strict=True) if gradient is not None]


def _refuse_useless(base: Base, name: str, unreached: Sequence[str], read: set[str]) -> None:
    """Raise ConfigError for each pattern all of whose modules are among `unreached`."""
    targets, lost = base.adapters[name].targets, set(unreached)
    kind, problems = type(base.model).__name__, []
    modules, weights = dict(targets.matched), dict[str, list[str]]()
    for path, pattern in targets.parameters.items():
        if pattern in modules:  # all-linear, of which experts are only a part
            modules[pattern] = [*modules[pattern], path]
        else:
            weights.setdefault(pattern, []).append(path)
    for option, patterns in (("target_modules", modules), ("target_parameters", weights),
                             ("modules_to_save", targets.saved)):  # fmt: skip
        for pattern, paths in patterns.items():
            if not paths or not lost.issuperset(paths):
                continue
            if read.isdisjoint(paths):
                text = _(
                    "lora.{option}: the loss does not depend on any module that {pattern!r} matches ({modules}), so "
                    "training would change nothing there. Leave it out.",
                    option=option,
                    pattern=pattern,
                    modules=listed(_places(paths)),
                )
            else:
                text = _(
                    "lora.{option}: {kind} computes with the weight of {names} and never calls the module, so "
                    "training would change nothing there. Leave it out.",
                    option=option,
                    kind=kind,
                    names=listed(_last_names(paths)),
                )
            problems.append(text)
    if problems:
        raise ConfigError(*problems)


def _tell(base: Base, read: Sequence[str], others: Sequence[str], weights: Sequence[str], report: Report) -> None:
    """Report what was left out: layers of which only the weight is read, layers that text does not reach, and weights.

    weights: the parameters that are adapted directly and that no text reaches.
    """
    if read:
        text = _(
            "{names}: no adapter, because {kind} computes with the weight of these layers without calling them",
            names=listed(_last_names(read)),
            kind=type(base.model).__name__,
        )
        report.say(text)
    if others:
        text = _(
            "{count} linear layers get no adapter, because a text does not reach them: {modules}",
            count=len(others),
            modules=listed(_places(others)),
        )
        report.say(text)
    if weights:
        text = _(
            "{names}: no adapter, because the loss of a text does not depend on these weights of {kind}",
            names=listed(_last_names(weights)),
            kind=type(base.model).__name__,
        )
        report.say(text)


def _tell_what_peft_refuses(base: Base, adapter: Adapter, report: Report) -> None:
    """Report modules that PEFT refuses: all-linear leaves them out, and with them PEFT cannot load the adapter."""
    kind, adapted = type(base.model).__name__, adapter.targets.adapted
    refused = [path for path in module_paths(base.model) if is_refused_by_peft(base.model, path)]
    refused = [path for path in refused if is_adaptable(base.model.get_submodule(path)) or path in adapted]
    left_out = _last_names(path for path in refused if path not in adapted)
    trained = [*(path for path in refused if path in adapted), *unreadable_in_peft(adapter, base.model)]
    if trained:
        text = _(
            "{names}: PEFT refuses LoRA on these layers of {kind}, so PEFT and the programs that use it cannot load "
            "this adapter. Merge it for them, or leave the layers out.",
            names=listed(_last_names(trained)),
            kind=kind,
        )
        report.warn(text)
    elif left_out:
        text = _(
            "{names}: no adapter, because PEFT refuses LoRA on these layers of {kind}. To train them for use in "
            "lorasmith, name them in --target-modules.",
            names=listed(left_out),
            kind=kind,
        )
        report.say(text)


def _last_names(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _places(paths: Iterable[str]) -> list[str]:
    """Where the modules are: their paths up to the number of a layer."""
    return list(dict.fromkeys(_role(path).partition(".*")[0] for path in paths))
