"""An adapter folder: PEFT's two files, and lorasmith.json with the one encoding and the identity of the base."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from lorasmith.config.files import parse_object
from lorasmith.config.lora import LoraConfig
from lorasmith.config.values import Typed, wrong_values
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    invalid_values,
    load_adapter,
    lora_config,
    parse_config,
    parse_weights,
    save_adapter,
    weights_file,
    weights_shapes,
)
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


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder, each file of it read once: all that anybody asks of it follows from those bytes.

    `hash` is the SHA-256 of what was read, and `tensors` came out of the same bytes: a folder that another training
    replaces meanwhile is either the old one or the new one. After a `glance` both are empty.
    """

    path: Path
    raw: Mapping[str, Any]  # adapter_config.json, as PEFT has it
    about: Mapping[str, Any] | None  # lorasmith.json; None where another tool made the adapter
    shapes: Mapping[str, tuple[int, ...]]
    size: int  # bytes of the weights
    hash: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """All of it. Raises AdapterError where a file is missing or broken."""
        contents, raw, about = _read_small(path)
        weights = weights_file(path).read_bytes()
        digests = [sha256(content).digest() for content in (contents[0], weights, *contents[1:])]
        tensors = parse_weights(weights, path / ADAPTER_WEIGHTS)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return cls(path, raw, about, shapes, len(weights), sha256(b"".join(digests)).hexdigest(), tensors)

    @classmethod
    def glance(cls, path: Path) -> Self:
        """What it says of itself, without the numbers in its weights. Raises AdapterError as `read` does."""
        _contents, raw, about = _read_small(path)
        weights = weights_file(path)
        return cls(path, raw, about, weights_shapes(weights), weights.stat().st_size)

    def without_tensors(self) -> Self:
        """The same, once the tensors have been put where they are needed."""
        return replace(self, tensors={})

    @property
    def config(self) -> LoraConfig:
        """What its layers are. Raises AdapterError where it holds options of PEFT that cannot be computed here."""
        return lora_config(self.raw, self.path / ADAPTER_CONFIG)

    @property
    def base(self) -> str:
        """The base model that it names. Raises AdapterError where it names none."""
        name = self.about["base"]["model"] if self.about else self.raw.get("base_model_name_or_path")
        if not name:
            raise AdapterError(
                _("{folder}: the adapter does not name its base model. Specify it with --model.", folder=self.path)
            )
        return str(name)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the training noted: its data, its dtype, its held-out loss."""
        return self.about["notes"] if self.about else {}

    def template(self, base: Base) -> Template:
        """Its own encoding, verified on this base and tokenizer; the base's where another tool made the adapter.

        Raises:
            AdapterError: another base or tokenizer than the adapter was trained on; says in what they differ.
        """
        if self.about is None:
            return Template.of(base.tokenizer, "auto", end_ids(base))
        here, then = base.identity, self.about["base"]["identity"]
        differing = [part for part in then if here.get(part) != then[part]]
        if differing:
            raise AdapterError(
                _(
                    "{folder}: {base} is not the base model that this adapter was trained on ({then}); they "
                    "differ in: {parts}. Specify the right one with --model.",
                    folder=self.path,
                    base=base.source,
                    then=self.about["base"]["model"],
                    parts=listed(map(foreign, differing)),
                )
            )
        return Template.from_json(self.about["template"], base.tokenizer)

    def load_into(self, base: Base, name: str) -> None:
        """Add it to `base` as the active adapter `name`. Raises AdapterError as `load_adapter` does."""
        base.adapters[name] = load_adapter(base.model, base.router, self.config, self.tensors, self.path, name)

    def tensors_in(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its tensors cast to `dtype`, for serving. Raises AdapterError if it has no effect or invalid values."""
        if problems := invalid_values(self.tensors):
            raise AdapterError(*(f"{self.path / ADAPTER_WEIGHTS}: {problem}" for problem in problems))
        return {key: tensor.to(dtype) for key, tensor in self.tensors.items()}


def _read_small(path: Path) -> tuple[list[bytes], dict[str, Any], dict[str, Any] | None]:
    """The bytes of adapter_config.json and, where it is there, of lorasmith.json, and what they say."""
    raw, about = path / ADAPTER_CONFIG, path / NAME
    if not raw.is_file():
        raise AdapterError(
            _("{folder} is not an adapter folder: it does not contain {name}.", folder=path, name=ADAPTER_CONFIG)
        )
    contents = [file.read_bytes() for file in (raw, about) if file.is_file()]
    return contents, parse_config(contents[0], raw), _parse_about(contents[1], about) if len(contents) > 1 else None


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
        if (folder / ADAPTER_CONFIG).is_file():
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
    raise AdapterError(_("{path}: not a run or adapter folder ({name} not found).", path=path, name=ADAPTER_CONFIG))


def _parse_about(content: bytes, path: Path) -> dict[str, Any]:
    """The content of a lorasmith.json, which was read from `path`. Raises AdapterError."""
    about = parse_object(content, path, AdapterError)
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


def end_ids(base: Base) -> tuple[int, ...]:
    """Token ids at which the model's own generation config ends a reply."""
    ends = getattr(base.model.generation_config, "eos_token_id", None)
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
