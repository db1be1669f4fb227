"""The Python interface: `train` and `load`, exported by the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import SECTIONS, load_config
from lorasmith.config.values import check, did_you_mean
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.runs import train as run
from lorasmith.system.autograd import autograd_on
from lorasmith.training.run_files import Summary
from lorasmith.training.run_folder import resumed_config


@autograd_on()
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
    """Train an adapter on `data`, write it to the run folder `output` and return the results.

    Args:
        data: one or several data files.
        lora: the LoRA options, such as rank and target modules.
        output: the run folder; runs/NAME-DATE by default.
        config: a TOML file with options; the arguments here override it.
        report: receives messages and progress; silent by default.
        resume: continue the run in `output`.
        overwrite: replace the run in `output`.
        options: any other option by its name, such as model="...", learning_rate=1e-4 or max_length=512.

    Raises:
        LorasmithError: one or several problems that the user can fix.
        Interrupted: the user pressed Ctrl-C; the progress is saved.
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
    """Load a base model with the adapters of these run or adapter folders; call `.generate(prompt)` on the result.

    Args:
        paths: run or adapter folders whose adapters have the same base model.
        model: name or path of the base model, if it is not the one that the adapter names.
        report: receives messages and progress; silent by default.
        options: dtype, device or trust_remote_code.

    Raises:
        LorasmithError: an adapter or the base model cannot be loaded, or they do not match.
    """
    settings = {**options, **({"model": model} if model else {})}
    return open_adapters(paths, check(ModelConfig, settings, "model"), report)


def _section_of(option: str) -> str:
    for name, part in SECTIONS.items():
        if option in part.model_fields:
            return name
    known = [key for part in SECTIONS.values() for key in part.model_fields]
    raise ConfigError(_("unknown option {option}.", option=option) + did_you_mean(option, known))
