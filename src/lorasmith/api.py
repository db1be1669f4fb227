"""The Python interface: what the command line does, in two functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import SECTIONS, load_config
from lorasmith.config.values import check, closest
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.runs import train as run
from lorasmith.training.run_folder import resumed_config
from lorasmith.training.summary import Summary


def train(
    data: str | Path | Sequence[str | Path] = (),
    *,
    lora: LoraConfig | None = None,
    output: str | Path | None = None,
    config: str | Path | None = None,
    report: Report | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Summary:
    """Train an adapter on `data` and return what it came to; its run folder is `output`.

    Args:
        data: one or several files of examples.
        lora: rank, targets and the like; its defaults where not given.
        output: the run folder; runs/NAME-DATE where not given.
        config: a TOML file whose values stand under the ones given here.
        report: who is told about the progress; nobody where not given.
        resume, overwrite: go on with the run in `output`, or replace it.
        options: any other option by its name: model="...", learning_rate=1e-4, max_length=512.

    Raises:
        LorasmithError: what the user can mend, every problem at once.
        Interrupted: Ctrl-C came, and what was done is saved.
    """
    files = [data] if isinstance(data, str | Path) else list(data)
    flags: dict[str, Any] = {"data": {"data": tuple(map(str, files))}} if files else {}
    for name, value in options.items():
        flags.setdefault(_section_of(name), {})[name] = value
    if lora is not None:
        flags["lora"] = {**lora.model_dump(exclude_unset=True), **flags.get("lora", {})}
    if output is not None:
        flags["output"] = str(output)
    path = Path(config) if config is not None else None
    if resume and path is None and output is not None:
        path = resumed_config(output)
    return run.train(load_config(path, flags), report, resume, overwrite)


def load(*paths: str | Path, model: str | None = None, report: Report | None = None, **options: Any) -> Session:
    """A base with the adapters of these run or adapter folders on it: `.generate(prompt)`, `.base`, `.template`.

    `model` names another copy of the base than the adapter does; options: dtype, device, trust_remote_code.
    """
    settings = {**options, **({"model": model} if model else {})}
    return open_adapters(paths, check(ModelConfig, settings, "model"), report)


def _section_of(option: str) -> str:
    for name, part in SECTIONS.items():
        if option in part.model_fields:
            return name
    known = [key for part in SECTIONS.values() for key in part.model_fields]
    raise ConfigError(_("unknown option {option}.", option=option) + closest(option, known))
