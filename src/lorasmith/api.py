"""The Python interface: `train`, `train_each` and `load`, exported by the package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import SECTIONS, Config, load_config
from lorasmith.config.values import check, did_you_mean
from lorasmith.data.dataset.by_name import files_by_name, named_by_file
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed
from lorasmith.report import Report
from lorasmith.runs import together
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
    given = _config(files, lora, output, config, resume, options)
    if names := files_by_name(given.data.data):
        raise ConfigError(_("train() trains one adapter, but the data has names ({names}). Use train_each().",
                            names=listed(list(names))))  # fmt: skip
    return run.train(given, report, resume, overwrite)


@autograd_on()
def train_each(
    data: Mapping[str, str | Path | Sequence[str | Path]] | str | Path = MappingProxyType({}),
    *,
    lora: LoraConfig | None = None,
    output: str | Path | None = None,
    config: str | Path | None = None,
    report: Report | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Summary]:
    """Train an adapter for each name in `data` over one base model, at once where each still gets its own result.

    Args:
        data: the data files of each adapter by its name; or a folder, each file of which trains an adapter.
        output: the folder of the run folders, each with the name of its adapter; runs/NAMES-DATE by default.
        lora, config, report, resume, overwrite, options: see `train`; all adapters have the same options.

    Returns:
        The results by name.

    Raises: see `train`.
    """
    if isinstance(data, str | Path):
        files: list[str | Path] = [*named_by_file([str(data)])]
    else:
        lists = {name: [own] if isinstance(own, str | Path) else own for name, own in dict(data).items()}
        files = [f"{name}={file}" for name, own in lists.items() for file in own]
    return together.train_each(_config(files, lora, output, config, resume, options), report, resume, overwrite)


def _config(
    files: Sequence[str | Path],
    lora: LoraConfig | None,
    output: str | Path | None,
    config: str | Path | None,
    resume: bool,
    options: Mapping[str, Any],
) -> Config:
    """The configuration of the arguments of `train`."""
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
    return load_config(path, flags)


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
