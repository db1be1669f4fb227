"""Adapter folders: PEFT's two files, plus lorasmith.json with the chat template and the identity of the base model.

`AdapterFolder` reads a folder, `write_adapter` writes one, and `find_adapter` finds the one inside a run.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasmith.adapters.foreign import foreign_template, trained_tokens, with_added_tokens
from lorasmith.config.files import parse_object, read_limited
from lorasmith.config.lora import LoraConfig
from lorasmith.config.values import Typed, validation_messages
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.isolated import IsolatedRenderer
from lorasmith.errors import AdapterError
from lorasmith.i18n import _, foreign, listed
from lorasmith.lora.adapter_config import ADAPTER_CONFIG, lora_config, parse_config
from lorasmith.lora.adapter_keys import peft_keys
from lorasmith.lora.early_experts import as_stored_now, stored_transposed
from lorasmith.lora.expert_pairs import in_parameters
from lorasmith.lora.files import (
    ADAPTER_WEIGHTS,
    invalid_values,
    load_adapter,
    parse_weights,
    save_adapter,
    weights_file,
    weights_shapes,
)
from lorasmith.lora.inject import module_paths
from lorasmith.lora.peft_targets import fitted
from lorasmith.model.base import Base
from lorasmith.model.vocabulary import embedding_kept_on_error, with_tokens

MAX_JSON = 2**24  # bytes; the files of a training have a few thousand
NAME, VERSION, WITH_TOKENS = "lorasmith.json", 1, 2  # versions, without and with added tokens


class _Identity(Typed):
    """The hashes that model/identity.py computes. All are required, because an empty identity would fit any base."""

    config: str
    tensors: str
    tokenizer: str


class _Base(Typed):
    model: str
    identity: _Identity


_Id = Annotated[int, Field(ge=0)]


class _Stop(Typed):
    id: _Id
    token: str | None


class _Token(Typed):
    id: _Id
    token: str


class _Golden(Typed):
    messages: list[dict[str, str]]
    ids: list[_Id]


class _Part(Typed):
    folder: str


class _Combined(Typed):
    adapters: list[_Part] = Field(default_factory=list)


class _Start(Typed):
    sha256: str


class _Notes(Typed):
    """The notes that lorasmith reads; others may hold anything."""

    data: list[str] = Field(default_factory=list)
    quantize: str = "none"
    dtype: str = "auto"
    combined: _Combined = Field(default_factory=_Combined)
    start_from: _Start | None = None


class _Template(Typed):
    version: int
    kind: Literal["model", "human-assistant", "alpaca", "chatml", "file"]
    chat_template: str
    system: str = ""
    stop: list[_Stop]
    golden: list[_Golden] = Field(max_length=100)  # each is rendered


class _Metadata(Typed):
    """The required content of lorasmith.json."""

    base: _Base
    template: _Template
    tokens: list[_Token] = Field(default_factory=list)
    notes: _Notes


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder in memory. Each file is read exactly once, and everything here comes from those bytes.

    So `hash`, the SHA-256 over all files, always belongs to `tensors`, even if a training replaces the folder at the
    same time. After `read_header` both are empty.
    """

    path: Path
    peft_config: Mapping[str, Any]  # content of adapter_config.json
    metadata: Mapping[str, Any] | None  # content of lorasmith.json; None if another tool made the adapter
    shapes: Mapping[str, tuple[int, ...]]
    size: int  # of the weights file, in bytes
    hash: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the whole folder. Raises AdapterError if a file is missing or broken."""
        contents, peft_config, metadata = _read_json_files(path)
        weights = weights_file(path).read_bytes()
        digests = [sha256(content).digest() for content in (contents[0], weights, *contents[1:])]
        tensors = parse_weights(weights, path / ADAPTER_WEIGHTS)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return cls(path, peft_config, metadata, shapes, len(weights), sha256(b"".join(digests)).hexdigest(), tensors)

    @classmethod
    def read_header(cls, path: Path) -> Self:
        """Read everything but the tensors themselves. Raises AdapterError as `read` does."""
        _contents, peft_config, metadata = _read_json_files(path)
        weights = weights_file(path)
        return cls(path, peft_config, metadata, weights_shapes(weights), weights.stat().st_size)

    def without_tensors(self) -> Self:
        """A copy without tensors, to free their memory once the model holds them."""
        return replace(self, tensors={})

    @property
    def config(self) -> LoraConfig:
        """The LoRA options of its layers. Raises AdapterError for PEFT options that are not supported."""
        return lora_config(self.peft_config, self.path / ADAPTER_CONFIG, self.shapes)

    @property
    def problems(self) -> list[str]:
        """Why it cannot be loaded on any base model, as far as its options tell; empty if it can."""
        try:
            _config = self.config
        except AdapterError as error:
            return list(error.problems)
        return []

    @property
    def base(self) -> str:
        """The name or path of its base model. Raises AdapterError if it does not name one."""
        name = self.metadata["base"]["model"] if self.metadata else self.peft_config.get("base_model_name_or_path")
        if not name:
            raise AdapterError(
                _("{folder}: the adapter does not name its base model. Specify it with --model.", folder=self.path)
            )
        return str(name)

    @property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that its training added to the vocabulary, and their ids; empty if another tool made it."""
        return {entry["token"]: entry["id"] for entry in (self.metadata or {}).get("tokens", [])}

    @property
    def notes(self) -> Mapping[str, Any]:
        """What training recorded: data files, maximum length and dtype; empty if another tool made the adapter."""
        return self.metadata["notes"] if self.metadata else {}

    @property
    def stored_transposed(self) -> bool | None:
        """See `lora.early_experts.stored_transposed`."""
        return stored_transposed(self.peft_config, self.metadata is not None)

    def template(self, base: Base, renderer: IsolatedRenderer | None = None) -> Template:
        """The template that it was trained with. See `foreign_template` for adapters of other tools.

        renderer: renders the adapter's own chat template; None to do it in this process.

        Raises AdapterError if `base` or its tokenizer is not the one that the adapter was trained on.
        """
        if self.metadata is None:
            return foreign_template(self.path, base, end_ids(base), renderer)
        here, then = base.identity, self.metadata["base"]["identity"]
        differing = [part for part in then if here.get(part) != then[part]]
        if differing:
            raise AdapterError(
                _(
                    "{folder}: {base} is not the base model that this adapter was trained on ({then}); they "
                    "differ in: {parts}. Specify the right one with --model.",
                    folder=self.path,
                    base=base.source,
                    then=self.metadata["base"]["model"],
                    parts=listed(map(foreign, differing)),
                )
            )
        return Template.from_json(self.metadata["template"], self._tokenizer(base), renderer)

    def _tokenizer(self, base: Base) -> PreTrainedTokenizerBase:
        """The tokenizer of its base model, with the tokens that its training added. Raises AdapterError."""
        tokenizer = with_tokens(base.tokenizer, self.added_tokens)
        for token, i in self.added_tokens.items():
            if (found := tokenizer.convert_tokens_to_ids(token)) != i:
                raise AdapterError(
                    _(
                        "{folder}: the added token {token} had the id {id} in the training, but the tokenizer of "
                        "{base} gives it the id {found}. Use the same base model and version of transformers.",
                        folder=self.path,
                        token=repr(token),
                        id=i,
                        found=found,
                        base=base.source,
                    )
                )
        return tokenizer

    def load_into(self, base: Base, name: str) -> None:
        """Add it to `base` as the active adapter `name`.

        Raises AdapterError as `load_adapter` and `fitted_to` do; the base is then what it was before.
        """
        with embedding_kept_on_error(base):
            config, tensors = self.fitted_to(base, self.tensors)
            tokens = trained_tokens(base, self.peft_config, tensors)
            base.adapters[name] = load_adapter(base.model, base.router, config, tensors, self.path, name, tokens)

    def fitted_to(self, base: Base, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Its config and `tensors`, which are its own in some dtype, after `base` got rows for the tokens that it adds.

        Both name the modules as `base` does. Raises AdapterError as `peft_keys` and `with_added_tokens` do.
        """
        tensors = self.by_peft_keys(base, tensors)
        config = fitted(self.config, self.peft_config, module_paths(base.model), tensors)
        config, tensors = in_parameters(base.model, config, tensors)
        try:
            tensors = as_stored_now(base.model, config, tensors, self.stored_transposed)
        except AdapterError as error:
            raise AdapterError(*(f"{self.path}: {problem}" for problem in error.problems)) from None
        return with_added_tokens(base, self.path, self.peft_config, config, tensors)

    def by_peft_keys(self, base: Base, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`, which are its own in some dtype, by PEFT's keys for this base. Raises as `peft_keys` does."""
        try:
            return peft_keys(tensors, module_paths(base.model), base.model.base_model_prefix)
        except AdapterError as error:
            raise AdapterError(*(f"{self.path / ADAPTER_WEIGHTS}: {problem}" for problem in error.problems)) from None

    def tensors_in(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its tensors cast to `dtype`, for serving. Raises AdapterError if it has no effect or invalid values."""
        if problems := invalid_values(self.tensors):
            raise AdapterError(*(f"{self.path / ADAPTER_WEIGHTS}: {problem}" for problem in problems))
        return {key: tensor.to(dtype) for key, tensor in self.tensors.items()}


def _read_json_files(path: Path) -> tuple[list[bytes], dict[str, Any], dict[str, Any] | None]:
    """The bytes of adapter_config.json and of lorasmith.json, if there is one, and the parsed content of both."""
    config, metadata = path / ADAPTER_CONFIG, path / NAME
    if not config.is_file():
        raise AdapterError(
            _("{folder} is not an adapter folder: it does not contain {name}.", folder=path, name=ADAPTER_CONFIG)
        )
    contents = [read_limited(file, MAX_JSON, AdapterError) for file in (config, metadata) if file.is_file()]
    parsed = _parse_metadata(contents[1], metadata) if len(contents) > 1 else None
    return contents, parse_config(contents[0], config), parsed


def write_adapter(base: Base, adapter: str, template: Template, folder: Path, notes: dict[str, Any]) -> None:
    """Write one adapter of `base` so that PEFT, vLLM and lorasmith can load it; `notes` may hold any JSON."""
    added = base.added_tokens
    about = {"model": absolute_if_exists(base.source), "identity": base.identity}
    text = metadata_text(about, template.to_json(), added, notes)
    source = absolute_if_exists(base.source if Path(base.source).expanduser().is_dir() else str(base.folder))
    save_adapter(base.adapters[adapter], base.model, folder, source, {NAME: text})
    if added:  # for other programs
        tokenizer = copy.copy(template.tokenizer)
        tokenizer.chat_template = template.as_jinja()
        tokenizer.save_pretrained(folder)


def metadata_text(
    base: Mapping[str, Any], template: Mapping[str, Any], tokens: Mapping[str, int], notes: Mapping[str, Any]
) -> str:
    """The text of lorasmith.json. tokens: the tokens that were added to the vocabulary, and their ids."""
    added = [{"id": i, "token": token} for token, i in tokens.items()]
    metadata = {
        "version": WITH_TOKENS if added else VERSION,
        "base": base,
        "template": template,
        **({"tokens": added} if added else {}),
        "notes": notes,
    }
    return json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"


def absolute_if_exists(name: str) -> str:
    """The absolute path of an existing file or folder; any other name, such as that of a model, is returned as is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def find_adapter(path: Path) -> Path:
    """The adapter folder at `path`, which may also be a run folder. Raises AdapterError if there is none."""
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if not path.exists():
        raise AdapterError(_("{path}: the folder does not exist.", path=path))
    if (model := find_model(path)) is not None:
        raise AdapterError(
            _(
                "{path}: this run trained all weights of its base model (--method full), so it has a model of its own "
                "instead of an adapter, in {model}. Use it as a base model: --model {model}",
                path=path,
                model=model,
            )
        )
    if (path / "config.toml").is_file():
        raise AdapterError(
            _(
                "{path}: this run has not finished, so it has no adapter yet. Resume it with: lorasmith train "
                "--output {path} --resume",
                path=path,
            )
        )
    raise AdapterError(_not_an_adapter(path))


def find_model(path: Path) -> Path | None:
    """The model of the run at `path`, or of which `path` is the model, if the run trained all weights; else None."""
    for run, model in ((path, path / "model"), (path.absolute().parent, path)):
        if (run / "config.toml").is_file() and (model / "config.json").is_file() and model.name == "model":
            return model
    return None


def _not_an_adapter(path: Path) -> str:
    """What is at `path` instead of an adapter, and what helps."""
    if path.is_file():
        return _("{path}: this is a file. Give the folder of the run or adapter.", path=path)
    named = sorted(inner.name for inner in path.iterdir() if (inner / ADAPTER_CONFIG).is_file())
    if named:  # PEFT's sub-folder of an adapter with a name, or the checkpoints of a trainer
        return _(
            "{path}: the adapters are in folders inside it: {names}. Give one of these, such as {first}.",
            path=path,
            names=listed(named),
            first=path / named[-1],
        )
    if (path / "config.json").is_file():
        return _("{path}: this is a model, not an adapter. Give it with --model.", path=path)
    return _("{path}: not a run or adapter folder ({name} not found).", path=path, name=ADAPTER_CONFIG)


def _parse_metadata(content: bytes, path: Path) -> dict[str, Any]:
    """Parse and check a lorasmith.json that was read from `path`. Raises AdapterError."""
    metadata = parse_object(content, path, AdapterError)
    version = metadata.get("version")
    if type(version) is not int or version not in (VERSION, WITH_TOKENS):
        raise AdapterError(
            _(
                "{path}: unsupported version {found}; this version of lorasmith reads version {known}.",
                path=path,
                found=version,
                known=f"{VERSION}, {WITH_TOKENS}",
            )
        )
    try:
        _Metadata.model_validate(metadata)
    except ValidationError as error:
        raise AdapterError(*(f"{path}: {text}" for text in validation_messages(error, _Metadata))) from None
    return metadata


def end_ids(base: Base) -> tuple[int, ...]:
    """The token ids that end a reply according to the model's generation config."""
    ends = getattr(base.model.generation_config, "eos_token_id", None)
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
