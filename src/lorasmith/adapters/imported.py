"""Importing an adapter of another program: the same adapter in a folder of ours, with the encoding of its training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lorasmith.adapters.folder import NAME, end_ids, write_adapter
from lorasmith.adapters.foreign import CHAT_TEMPLATE, chat_template_of
from lorasmith.adapters.merge import adapter_logits, probe_rows
from lorasmith.adapters.mlx_folder import write_as_peft
from lorasmith.adapters.other_programs import Recorded, recorded
from lorasmith.adapters.output import output_folder
from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.data.template.encoding import Template
from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.report import Report
from lorasmith.system.autograd import autograd_on

OURS = ("chatml", "alpaca")  # names of templates that mean the same in other programs
LIMIT = 1e-4  # relative error of the logits of the imported adapter: the same tensors, rounded once at most


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
            session = open_adapters([place], model, report, tells_template=False)
        template, template_from, system_from = _template(found, session, data)
        base, name, probes = session.base, session.names[0], probe_rows(session)
        wanted, errors = adapter_logits(session, probes), list[float]()
        base.tokenizer = load_tokenizer(base.folder)  # the session has the one beside the adapter
        known, words = base.tokenizer.get_vocab(), template.tokenizer.get_vocab()
        base.added_tokens = {word: words[word] for word in sorted(words.keys() - known.keys(), key=words.__getitem__)}

        def fill(staging: Path) -> None:
            write_adapter(
                base, name, template, staging, {"imported": {"program": found.program, "template": found.template}}
            )
            again = open_adapters([staging], model, Report())
            errors.append(_distance(wanted, adapter_logits(again, probes)))
            if not errors[0] <= LIMIT:
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
            template.system, system_from, errors[0],
        )  # fmt: skip


@contextmanager
def _as_peft(found: Recorded) -> Iterator[Path]:
    """The folder with PEFT's files, which is a temporary one for an adapter of mlx-lm."""
    if not found.is_mlx:
        yield found.folder
        return
    with TemporaryDirectory(prefix="lorasmith-import-") as place:
        write_as_peft(found.folder, Path(place))
        yield Path(place)


def _template(found: Recorded, session: Session, data: DataConfig) -> tuple[Template, str, str]:
    """The template with its system text, and where each comes from. Raises AdapterError if it is not known."""
    name, own = "auto", _own_template(found.folder)
    if "template" in data.model_fields_set:
        name, said = data.template, _("as requested")
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
    return Template.from_config(session.template.tokenizer, settings, end_ids(session.base)), said, system_said


def _own_template(folder: Path) -> str:
    """The file in the folder that has the chat template; empty if none has."""
    if (folder / CHAT_TEMPLATE).is_file():
        return CHAT_TEMPLATE
    if chat_template_of(folder) is not None:
        return "tokenizer_config.json"
    return ""


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The relative error of the logits."""
    a, b = (torch.cat([one.double() for one in side]) for side in (wanted, found))
    return float((a - b).pow(2).mean().sqrt() / a.pow(2).mean().sqrt())
