"""Starting from an existing adapter, as training.start_from asks: its weights and shape, and a new optimizer.

Everything that the weights depend on stays as it was: base model, template, and the options of LoRA. An option that
is given and differs is refused; those that are not given are taken from the adapter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import AdapterFolder, find_adapter
from lorasmith.adapters.foreign import CHAT_TEMPLATE
from lorasmith.adapters.session import base_settings
from lorasmith.config.lora import LoraConfig
from lorasmith.config.toml import Config
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.files import load_adapter
from lorasmith.lora.inject import Adapter, remove
from lorasmith.lora.saved_values import saved_values
from lorasmith.lora.target import Targets, find_targets
from lorasmith.lora.variant import variant_of
from lorasmith.model.base import Base
from lorasmith.report import Report

TARGETS = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "last_layers")
OPTIONS = {  # from which each part of a stored template comes
    "kind": "data.template", "chat_template": "data.template", "tool_template": "data.template",
    "system": "data.system", "kwargs": "data.template_kwargs", "system_as": "data.system_as",
    "special_tokens": "data.special_tokens", "leading_answer": "data.leading_answer", "stop": "the stop tokens",
    "end": "the end token",
}  # fmt: skip
FREE = ("lora_dropout",)  # has no influence on what the weights mean


def read_start(config: Config) -> AdapterFolder | None:
    """The adapter that training.start_from names, or None. Raises AdapterError if there is none in that folder."""
    name = config.training.start_from
    if name is None:
        return None
    try:
        return AdapterFolder.read(find_adapter(Path(name).expanduser()))
    except AdapterError as error:
        raise AdapterError(*(f"training.start_from: {problem}" for problem in error.problems)) from None


def start_notes(start: AdapterFolder | None, saved: Path | None) -> dict[str, Any]:
    """What the adapter folder records of the adapter `start`; that of the checkpoint `saved` if a run is resumed.

    Raises AdapterError if the checkpoint is broken.
    """
    if start is not None:
        return {"start_from": {"folder": str(start.path.absolute()), "sha256": start.hash}}
    notes = AdapterFolder.read_header(saved).notes if saved is not None else {}
    return {key: notes[key] for key in ("start_from",) if key in notes}


def continued(config: Config, start: AdapterFolder, report: Report) -> Config:
    """`config` with the base model, the added tokens and the LoRA options of the adapter `start`.

    Raises ConfigError that names every option that is given and differs. Target modules are compared in `load_start`.
    """
    theirs, given = _as_saved(start.config), config.lora
    fixed = [key for key in LoraConfig.model_fields if key in given.model_fields_set and key not in (*TARGETS, *FREE)]
    problems = [
        _differs(start, f"lora.{key}", getattr(theirs, key), getattr(given, key))
        for key in fixed
        if getattr(given, key) != getattr(theirs, key)
    ]
    tokens = tuple(start.added_tokens)
    if config.data.add_tokens not in ((), tokens):
        problems.append(_differs(start, "data.add_tokens", tokens, config.data.add_tokens))
    if problems:
        raise ConfigError(*problems)
    data = config.data.model_copy(update={"add_tokens": tokens})
    free = {key: getattr(given, key) for key in FREE if key in given.model_fields_set}
    model = base_settings(start, config.model, report)
    return config.model_copy(update={"lora": theirs.model_copy(update=free), "model": model, "data": data})


def _as_saved(config: LoraConfig) -> LoraConfig:
    """The options to go on with: those of the plain LoRA as which PiSSA and OLoRA are saved; else the same object."""
    return variant_of(config).saved_config(config)


def load_start(base: Base, start: AdapterFolder, given: LoraConfig, name: str) -> Adapter:
    """Add the adapter to `base`, to be trained further. given: the LoRA options that the user gave.

    Raises:
        ConfigError: target modules are given that differ from those of the adapter.
        AdapterError: the adapter does not belong to this base model.
    """
    wanted = None
    if given.model_fields_set & set(TARGETS):
        wanted = find_targets(base.model, LoraConfig(**{key: getattr(given, key) for key in TARGETS}))
    free = {key: getattr(given, key) for key in FREE if key in given.model_fields_set}
    replace(start, peft_config={**start.peft_config, **free}).load_into(base, name)
    adapter = base.adapters[name]
    config = _as_saved(adapter.config)
    if config is not adapter.config:
        tensors = saved_values(adapter, base.model)
        remove(base.model, name)
        adapter = base.adapters[name] = load_adapter(base.model, base.router, config, tensors, start.path, name)
    if wanted is not None and _paths(wanted) != _paths(adapter.targets):
        text = _(
            "lora.target_modules: {folder} has {theirs} adapted modules, but these options select {ours}, and not the "
            "same ones. Remove the options that select modules, so that those of the adapter are used.",
            folder=start.path,
            theirs=len(_paths(adapter.targets)),
            ours=len(_paths(wanted)),
        )
        raise ConfigError(text)
    return adapter


def _paths(targets: Targets) -> set[str]:
    return {*targets.adapted, *targets.parameters}


def load_checkpoint(base: Base, saved: Path, name: str) -> Adapter:
    """Add the adapter of the checkpoint `saved`, whose form is that of the one it started from. Raises AdapterError."""
    AdapterFolder.read(saved).load_into(base, name)
    return base.adapters[name]


def check_encoding(start: AdapterFolder, base: Base, template: Template, report: Report) -> None:
    """Check that rows are encoded as when the adapter was trained; warn if its folder does not tell.

    Raises:
        AdapterError: the adapter belongs to another base model or tokenizer.
        ConfigError: it was trained with another template or system message.
    """
    if start.metadata is None:
        _check_foreign(start, base, template, report)
        return
    then, now = (_flat(found.to_json()) for found in (start.template(base), template))
    differing = [key for key in now if key not in ("version", "kind", "golden") and then.get(key) != now[key]]
    same_text = now["chat_template"] == then["chat_template"] != ""  # such as the model's own, from a file
    if now["kind"] != then["kind"] and not same_text:
        differing = ["kind"]
    if differing:
        raise ConfigError(*(_differs(start, OPTIONS.get(key, key), then.get(key), now[key]) for key in differing))


def _check_foreign(start: AdapterFolder, base: Base, template: Template, report: Report) -> None:
    """The same for an adapter of another tool, whose folder may hold a tokenizer and a chat template."""
    theirs = start.template(base)
    if theirs.tokenizer is base.tokenizer:
        report.warn(
            _(
                "{folder}: the adapter was made by another tool, so it cannot be checked whether it was trained with "
                "the template used here.",
                folder=start.path,
            )
        )
    elif theirs.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise AdapterError(
            _(
                "{folder}: the adapter was trained with tokens that were added to the tokenizer of {base}, so training "
                "cannot continue from it. Merge it into its base model, and train on the result.",
                folder=start.path,
                base=base.source,
            )
        )
    elif theirs.text != template.text:
        raise _other_template(start, base, theirs.text)


def _other_template(start: AdapterFolder, base: Base, text: str) -> ConfigError:
    """The error for an adapter of another tool with a chat template, `text`, that is not the one used here."""
    path = start.path / CHAT_TEMPLATE
    if text == base.tokenizer.chat_template:
        return ConfigError(
            _(
                "data.template: {folder} was trained by another tool with the model's own chat template, which is not "
                "the one used here. Continue with the same one: --template model",
                folder=start.path,
            )
        )
    if path.is_file():
        return ConfigError(
            _(
                "data.template: {folder} was trained by another tool with the chat template in its folder, which is "
                "not the one used here. Continue with the same one: --template {path}",
                folder=start.path,
                path=path,
            )
        )
    return ConfigError(
        _(
            "data.template: {folder} was trained by another tool with the chat template in its tokenizer_config.json, "
            "which is not the one used here. Save that template as {path}, and continue with --template {path}",
            folder=start.path,
            path=path,
        )
    )


def _flat(template: dict[str, Any]) -> dict[str, Any]:
    """The parts of a stored template, with its options beside them."""
    parts = {key: value for key, value in template.items() if key != "options"}
    return parts | dict(template["options"])


def _differs(start: AdapterFolder, key: str, theirs: object, ours: object) -> str:
    return _(
        "{key}: {ours}, but {folder} was trained with {theirs}. Continue with the same value.",
        key=key,
        ours=_shown(ours),
        folder=start.path,
        theirs=_shown(theirs),
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
