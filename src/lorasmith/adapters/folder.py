"""What an adapter folder of lorasmith holds beside PEFT's files: lorasmith.json, and what must agree when it is used.

It carries the one encoding (template, stop tokens, golden ids) and the base's identity.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from lorasmith.config.files import read_object
from lorasmith.config.values import Typed, wrong_values
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.files import CONFIG, read_config, save_adapter
from lorasmith.model.base import Base

NAME, VERSION = "lorasmith.json", 1


class _Identity(Typed):
    """As model/identity.py makes it: an empty one would fit any base."""

    config: str
    tensors: str
    tokenizer: str


class _Base(Typed):
    model: str
    identity: _Identity


class _Stop(Typed):
    id: int
    token: str | None


class _Golden(Typed):
    messages: list[dict[str, str]]
    ids: list[int]


class _Template(Typed):
    version: int
    kind: Literal["model", "human-assistant", "alpaca", "chatml", "file"]
    chat_template: str
    system: str = ""
    stop: list[_Stop]
    golden: list[_Golden]


class _About(Typed):
    """What lorasmith.json must hold; of the notes nothing is asked."""

    base: _Base
    template: _Template
    notes: dict[str, Any]


def write_adapter(base: Base, adapter: str, template: Template, folder: Path, notes: dict[str, Any]) -> None:
    """Write one adapter of `base` for PEFT, vLLM and lorasmith. `notes` is free: data, held-out loss."""
    about = {
        "version": VERSION,
        "base": {"model": lasting(base.source), "identity": base.identity},
        "template": template.to_json(),
        "notes": notes,
    }
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    source = lasting(base.source if Path(base.source).expanduser().is_dir() else str(base.folder))
    save_adapter(base.adapters[adapter], base.model, folder, source, {NAME: text})


def lasting(name: str) -> str:
    """A path as it is from any working directory; a name that is no path here stays."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def find_adapter(path: Path) -> Path:
    """The adapter folder that `path` is or, as a run, holds. Raises AdapterError where there is none."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists():
        raise AdapterError(_("{path}: the folder does not exist.", path=path))
    if (path / "config.toml").is_file():
        raise AdapterError(
            _(
                "{path}: this run has not finished, so it has no adapter yet. Resume it with: lorasmith train "
                "--output {path} --resume",
                path=path,
            )
        )
    raise AdapterError(_("{path}: not a run or adapter folder ({name} not found).", path=path, name=CONFIG))


def read_about(folder: Path) -> dict[str, Any] | None:
    """lorasmith.json of an adapter folder; None where another tool made the adapter. Raises AdapterError."""
    path = folder / NAME
    if not path.is_file():
        return None
    about = read_object(path, AdapterError)
    version = about.get("version")
    if type(version) is not int or version != VERSION:
        raise AdapterError(
            _(
                "{path}: unsupported version {found}; this version of lorasmith reads version {known}.",
                path=path,
                found=version,
                known=VERSION,
            )
        )
    try:
        _About.model_validate(about)
    except ValidationError as error:
        raise AdapterError(*(f"{path}: {text}" for text in wrong_values(error, _About))) from None
    return about


def base_of(folder: Path) -> str:
    """The base model that the adapter names. Raises AdapterError where it names none."""
    about = read_about(folder)
    name = about["base"]["model"] if about else read_config(folder).get("base_model_name_or_path")
    if not name:
        raise AdapterError(
            _("{folder}: the adapter does not name its base model. Specify it with --model.", folder=folder)
        )
    return str(name)


def template_for(folder: Path, base: Base) -> Template:
    """The adapter's own encoding, verified on this base and tokenizer.

    Raises:
        AdapterError: another base or tokenizer than the adapter was trained on; says in what they differ.
    """
    about = read_about(folder)
    if about is None:
        return Template.of(base.tokenizer, "auto", end_ids(base))
    here, then = base.identity, about["base"]["identity"]
    differing = [part for part in then if here.get(part) != then[part]]
    if differing:
        raise AdapterError(
            _(
                "{folder}: {base} is not the base model that this adapter was trained on ({then}); they differ "
                "in: {parts}. Specify the right one with --model.",
                folder=folder,
                base=base.source,
                then=about["base"]["model"],
                parts=listed(map(foreign, differing)),
            )
        )
    return Template.from_json(about["template"], base.tokenizer)


def end_ids(base: Base) -> tuple[int, ...]:
    """Token ids at which the model's own generation config ends a reply."""
    ends = getattr(base.model.generation_config, "eos_token_id", None)
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
