"""Importing an adapter of another program: the same adapter in a folder of ours, with the encoding of its training."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedTokenizerBase

from lorasmith.adapters.folder import NAME, AdapterFolder, absolute_if_exists, end_ids, metadata_text
from lorasmith.adapters.foreign import CHAT_TEMPLATE, chat_template_of
from lorasmith.adapters.merge import adapter_logits, certify, probe_rows
from lorasmith.adapters.mlx_folder import write_as_peft
from lorasmith.adapters.other_programs import MLX_WEIGHTS, Recorded, recorded
from lorasmith.adapters.output import output_folder
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.files import read_object
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.lora.files import ADAPTER_WEIGHTS, write_files
from lorasmith.model.base import Base
from lorasmith.report import Report
from lorasmith.system.autograd import autograd_on

BASE = "base_model_name_or_path"
QUANTIZED = re.compile(r"(?i)[-_.](\d+-?bit|mxfp\d|nvfp\d)\b")  # in names of models that mlx-lm quantized
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # variables of chat templates
OURS = ("chatml", "alpaca")  # names of templates that mean the same in other programs


@dataclass(frozen=True)
class Imported:
    """What was imported. template_from, system_from: where they come from, in words.

    system_from is empty if the program did not record whether there was a system text.
    """

    folder: str
    program: str
    source: str
    base: str
    template: str
    template_from: str
    system: str
    system_from: str
    error: float
    unlike: str = ""  # the program's own template, which may differ from `template`


@autograd_on()
def import_adapter(
    path: str | Path,
    output: str | Path,
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Imported:
    """Write the adapter at `path`, which another program made, to the adapter folder `output`.

    data: its `template` and `system`, where they are set, take precedence over what the program recorded.

    Raises:
        RunError: `output` exists and is not to be replaced, or cannot be written.
        AdapterError: there is no adapter of another program, it does not fit the base model, or its template is not
            known.
        ModelError: the base model cannot be loaded.
    """
    report, data, model = report or Report(), data or DataConfig(), model or ModelConfig()
    with output_folder(output, overwrite, "adapter") as folder:
        found = recorded(Path(path).expanduser())
        if (found.folder / NAME).is_file():
            raise AdapterError(
                _("{folder}: lorasmith wrote this adapter, so it can be used as it is.", folder=found.folder)
            )
        folder.spare([found.folder])
        with _as_peft(found) as place:
            session = open_adapters([place], _with_base(model, found), report, tells_template=False)
            peft = AdapterFolder.read(place)
        base = session.base
        base.tokenizer = load_tokenizer(base.folder)  # the session has the one beside the adapter
        template, template_from, system_from = _template(found, session, data)
        probes = probe_rows(session)
        wanted, errors = adapter_logits(session, probes), list[float]()

        def fill(staging: Path) -> None:
            _write(staging, found, peft, base, template)
            again = open_adapters([staging], model, Report())
            result = certify("", torch.float32, wanted, [wanted], adapter_logits(again, probes), False)
            errors.append(result.error)
            if not result.holds:
                raise AdapterError(
                    _(
                        "{folder}: read again, the imported adapter differs from the one of {program} (relative error "
                        "of the logits {error:.1e}). It was not written. Please report this.",
                        folder=folder.path,
                        program=found.program,
                        error=errors[0],
                    )
                )

        folder.write(fill)
        return Imported(
            str(folder.path), found.program, str(found.folder), base.source, template.kind, template_from,
            template.system, system_from, errors[0], _unlike(found, template, data),
        )  # fmt: skip


def _with_base(model: ModelConfig, found: Recorded) -> ModelConfig:
    """How to load the base model; a recorded name stands in for a path of another machine.

    Raises AdapterError for a model that is quantized for mlx-lm.
    """
    if "model" in model.model_fields_set:
        return model
    own = read_object(found.folder / ADAPTER_CONFIG, AdapterError).get("model" if found.is_mlx else BASE)
    name = str(own or "")
    if found.is_mlx and QUANTIZED.search(name) and not Path(name).expanduser().exists():
        raise AdapterError(
            _(
                "{folder}: the adapter was trained on {base}, a model quantized for mlx-lm, which lorasmith does not "
                "read. Specify the model that it was made from with --model.",
                folder=found.folder,
                base=name,
            )
        )
    is_lost = not name or (name.startswith(("/", "~", ".")) and not Path(name).expanduser().exists())
    return (
        ModelConfig(**model.model_dump(exclude_unset=True) | {"model": found.base}) if is_lost and found.base else model
    )


def _write(staging: Path, found: Recorded, peft: AdapterFolder, base: Base, template: Template) -> None:
    """Write PEFT's files with the tensors as they are, lorasmith.json, and the tokenizer if it has more tokens."""
    known, words = base.tokenizer.get_vocab(), template.tokenizer.get_vocab()
    added = {word: words[word] for word in sorted(words.keys() - known.keys(), key=words.__getitem__)}
    name = absolute_if_exists(base.source)
    notes = {"imported": {"program": found.program, "template": found.template}}
    text = metadata_text({"model": name, "identity": base.identity}, template.to_json(), added, notes)
    write_files(staging, dict(peft.tensors), dict(peft.peft_config) | {BASE: name}, {NAME: text})
    if added:  # for other programs
        tokenizer = copy.copy(template.tokenizer)
        tokenizer.chat_template = template.as_jinja()
        tokenizer.save_pretrained(staging)


def _unlike(found: Recorded, template: Template, data: DataConfig) -> str:
    """The name of a template of the program that may differ from the one in Jinja that the adapter got, or empty."""
    is_same = template.kind == found.template or "template" in data.model_fields_set
    return found.template if found.has_own_template and not is_same else ""


@contextmanager
def _as_peft(found: Recorded) -> Iterator[Path]:
    """The folder with PEFT's files, which is a temporary one for an adapter of mlx-lm."""
    if not found.is_mlx:
        yield found.folder
        return
    with TemporaryDirectory(prefix="lorasmith-import-") as place:
        write_as_peft(found.folder, Path(place))
        try:
            yield Path(place)
        except AdapterError as error:
            problems = (text.replace(ADAPTER_WEIGHTS, MLX_WEIGHTS) for text in error.problems)
            raise AdapterError(*(text.replace(place, str(found.folder)) for text in problems)) from None


def _template(found: Recorded, session: Session, data: DataConfig) -> tuple[Template, str, str]:
    """The template with its system text, and where each comes from. Raises AdapterError if it is not known."""
    name, own = "auto", _own_template(found.folder)
    if "template" in data.model_fields_set:
        name, said = data.template, _("as requested")
    elif found.is_plain:
        raise AdapterError(
            _(
                "{file}: the adapter was trained without a chat template. Say how prompts become text with --template.",
                file=found.folder / found.file,
            )
        )
    elif own:
        said = _("{file} in the folder", file=own)
    elif found.template in OURS:
        name, said = found.template, _("{file} in the folder", file=found.file)
    elif session.template.tokenizer.chat_template is None:
        raise AdapterError(
            _(
                "{folder}: the template of its training is not in it ({program} {name}), and the base model has none. "
                "Give it with --template: chatml, alpaca, human-assistant or a Jinja file.",
                folder=found.folder,
                program=found.program,
                name=found.template or _("does not record it"),
            )
        )
    else:
        said = _("the base model's own")
    system, system_said = found.system or "", _("{file} in the folder", file=found.file)
    if "system" in data.model_fields_set:
        system, system_said = data.system, _("as requested")
    elif found.system is None:
        system_said = ""
    settings = DataConfig(**{**data.model_dump(exclude_unset=True), "template": name, "system": system})
    tokenizer, ends = session.template.tokenizer, end_ids(session.base)
    bare = Template.from_config(tokenizer, settings.model_copy(update={"system": ""}), ends)
    kwargs = _variables(found, bare, session.base.tokenizer) | settings.template_kwargs
    return (
        Template.from_config(tokenizer, settings.model_copy(update={"template_kwargs": kwargs}), ends),
        said,
        system_said,
    )


def _variables(found: Recorded, template: Template, own: PreTrainedTokenizerBase) -> dict[str, bool | str]:
    """The variables of the template that differ from what the tokenizer of the base model says."""
    values: dict[str, bool | str] = {
        name: str(theirs)
        for name in SPECIAL
        if (theirs := getattr(template.tokenizer, name)) not in (None, getattr(own, name)) and name in template.text
    }
    if found.thinking is not None and "enable_thinking" in template.text:
        values["enable_thinking"] = found.thinking
    return values


def _own_template(folder: Path) -> str:
    """The file in the folder that has the chat template; empty if none has."""
    if (folder / CHAT_TEMPLATE).is_file():
        return CHAT_TEMPLATE
    if chat_template_of(folder) is not None:
        return "tokenizer_config.json"
    return ""
