"""The modules that PEFT selects, and the order in which it adds LoRA to them, and so draws the numbers of A."""

from collections.abc import Collection, Iterable

from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.expressions import ends_with
from lorasmith.lora.inject import unwrapped
from lorasmith.lora.target import Targets, find_targets

_CLASSIFIERS = ("classifier", "score")  # PEFT adds both to modules_to_save of a classifier, which has one of them


def present(model: PreTrainedModel, modules_to_save: Iterable[str] | None) -> tuple[str, ...]:
    """The names without those that PEFT adds for every classifier and that this model lacks."""
    paths, names = [path for path, _module in model.named_modules()], dict.fromkeys(modules_to_save or ())
    added = _CLASSIFIERS if names.keys() >= set(_CLASSIFIERS) else ()
    return tuple(name for name in names if name not in added or any(ends_with(path, name) for path in paths))


def in_order(
    model: PreTrainedModel, config: LoraConfig, strict: bool, outside: Collection[str]
) -> tuple[LoraConfig, Targets]:
    """The options with the full paths of the target modules in PEFT's order: the model's, those by weight last.

    strict: see `find_targets`, whose result is returned too. outside: modules in which no LoRA is added.
    """
    with unwrapped(model):
        targets = find_targets(model, config, strict=strict)
        order = {path: i for i, (path, _module) in enumerate(model.named_modules())}
    by_weight = {path for name in config.target_parameters or () for path in targets.matched.get(name, ())}
    paths = sorted(targets.adapted, key=lambda path: (path in by_weight, order[path]))
    kept = tuple(path for path in paths if not any(path.startswith(f"{outer}.") for outer in outside))
    given = {"target_modules": kept, "exclude_modules": None, "layers_to_transform": None}
    return config.model_copy(update=given | {"target_parameters": tuple(targets.parameters) or None}), targets
