"""A run's folder: which one, whether it may be used, what is written first, and what says that it is finished.

The files in it are listed in run.py.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import lasting
from lorasmith.config.data import TEMPLATES
from lorasmith.config.toml import Config, load_config, to_toml
from lorasmith.config.values import read_back
from lorasmith.data.dataset.mix import split_weight
from lorasmith.errors import ConfigError, RunError
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.system.locking import locked
from lorasmith.system.ownership import MARKER, clear, is_marked, mark, named, of_others
from lorasmith.system.writing import remove, sync, write_file, writing
from lorasmith.training.distributed import World
from lorasmith.training.files import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    LOCK,
    SUMMARY,
    is_leftover,
    is_of_run,
    is_run,
    recover_run,
)

LEFT_OPEN = ("model.dtype", "model.device", "data.template", "data.max_length")  # their defaults say "you choose"
COPIES = 11  # of the adapter, at most at once: adapter/, two checkpoints with values and moments, two of the best
OTHER_BYTES = 2**20  # loss.png, metrics.jsonl and the like


def choose_folder(config: Config, world: World) -> Path:
    """The folder that `config` names, else runs/NAME-DATE: one for all processes."""
    if config.output:
        return Path(config.output).expanduser()
    name = Path(split_weight(config.data.data[0])[0]).stem.replace(":", "-") if config.data.data else "run"
    return Path(world.agree(str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")))


def resumed_config(output: str | Path) -> Path | None:
    """The file that a run in `output` goes on with; None where there is none."""
    began = Path(output).expanduser() / CONFIG
    return began if began.is_file() else None


def located(config: Config) -> Config:
    """`config` with the paths of its base, examples and template as they are from any working directory."""
    data, model = config.data, config.model
    files = tuple(lasting(name) + weight for name, weight in map(split_weight, data.data))
    share = lasting(data.held_out) if isinstance(data.held_out, str) else data.held_out
    template = data.template if data.template in TEMPLATES else lasting(data.template)
    metric = tuple(_lasting_function(text) for text in config.training.metric)
    return config.model_copy(
        update={
            "data": data.model_copy(update={"data": files, "held_out": share, "template": template}),
            "model": model.model_copy(update={"model": lasting(model.model)}),
            "training": config.training.model_copy(update={"metric": metric}),
        }
    )


def _lasting_function(text: str) -> str:
    """FILE.py:FUNCTION as it is from any working directory."""
    file, colon, name = text.rpartition(":")
    return lasting(file) + colon + name


@contextmanager
def in_use(folder: Path, world: World, report: Report, resume: bool) -> Iterator[None]:
    """Within it no other training takes the folder, which `list` then shows as running; one process asks for all.

    Raises RunError, in every process, where another training has it or it cannot be written.
    """
    with ExitStack() as stack:
        problem = ""
        if world.is_first:
            try:
                stack.enter_context(_locked(folder, report, resume))
            except RunError as error:
                problem = str(error)
        problem = world.agree(problem)
        if problem:
            raise RunError(problem)
        yield


@contextmanager
def _locked(folder: Path, report: Report, resume: bool) -> Iterator[None]:
    """Raises RunError."""
    if folder.exists() and not folder.is_dir():
        raise RunError(_("{folder} is a file, not a folder. Choose another --output.", folder=folder))
    if resume and not folder.is_dir():
        raise _nothing_to_resume(folder)
    with ExitStack() as stack:
        with writing(folder, is_run=resume):
            has_locks = stack.enter_context(locked(folder / LOCK, folder))
        if not has_locks:
            report.warn(
                _(
                    "{folder}: this file system does not support locks, so a second training could write into this "
                    "folder too. Do not start one there.",
                    folder=folder,
                )
            )
        yield


def check_folder(folder: Path, config: Config, resume: bool, overwrite: bool) -> Config:
    """What to train with, before anything is loaded: `config`, or what a resumed run began with.

    Raises RunError: a run is there and is not to be replaced, none is there to resume, it began otherwise, or
    --overwrite would remove what others wrote.
    """
    if resume:
        if not is_run(folder):
            raise _nothing_to_resume(folder)
        return _as_it_began(folder, config)
    if folder.exists() and not folder.is_dir():
        raise RunError(_("{folder} is a file, not a folder. Choose another --output.", folder=folder))
    if not _is_used(folder):
        return config
    if not overwrite:
        raise RunError(
            _(
                "{folder} already exists. Continue with --resume, replace it with --overwrite, or choose "
                "another --output (in Python: resume=True, overwrite=True, output=).",
                folder=folder,
            )
        )
    _refuse_of_others(folder)
    return config


def _nothing_to_resume(folder: Path) -> RunError:
    if (folder / CONFIG).is_file():
        text = _(
            "{folder}: no run to resume there: its config.toml was not written by `lorasmith train`.",
            folder=folder,
        )
        return RunError(text)
    return RunError(_("{folder}: no run to resume (config.toml not found).", folder=folder))


def _is_used(folder: Path) -> bool:
    """Whether something is in it, but for what is there before a training begins to write."""
    if not folder.is_dir():
        return False
    begun = is_marked(folder, "run")  # killed before it had its config.toml, it left nothing that one could lose
    first = {LOCK, *((MARKER, ENVIRONMENT) if begun else ())}
    return any(path.name not in first and not is_leftover(path.name) for path in folder.iterdir())


def _refuse_of_others(folder: Path) -> None:
    """Raise RunError where a folder is not a run, or holds what no training writes."""
    if not (is_marked(folder, "run") or _is_of_0_1_0(folder)):
        raise RunError(
            _(
                "{folder} was not written by `lorasmith train`, so --overwrite does not replace it. Choose another "
                "--output, or remove the folder yourself.",
                folder=folder,
            )
        )
    if others := of_others(folder, is_of_run):
        raise RunError(
            _(
                "{folder} contains {names}, which lorasmith did not write, so --overwrite does not replace it. Move "
                "what you want to keep, remove the rest, or choose another --output.",
                folder=folder,
                names=named(others),
            )
        )


def _is_of_0_1_0(folder: Path) -> bool:
    """Whether a training before there were markers wrote it: by what is in its two first files."""
    try:
        load_config(folder / CONFIG, {})
        return read_back(folder / ENVIRONMENT, dict[str, str]).keys() >= {"lorasmith", "train_sha256"}
    except (ConfigError, OSError, ValueError):
        return False


def begin(folder: Path, config: Config, reasons: dict[str, str], environment: dict[str, str]) -> None:
    """Write what a run begins with, over the run that was there. Raises RunError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if _is_used(folder):
            _refuse_of_others(folder)  # what came while the base was loaded
            mark(folder, "run")
            remove(folder / SUMMARY)  # first, and the configuration not at all: what is left is an unfinished run
            clear(folder, is_of_run, keep=frozenset({MARKER, LOCK, CONFIG}))
        mark(folder, "run")
        recover_run(folder)
        write_file(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
        write_file(folder / CONFIG, to_toml(config, reasons))
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        sync(folder)
        sync(folder.absolute().parent)


def check_space(folder: Path, adapter_bytes: int) -> None:
    """Raises RunError where the disk has no room for what a run writes."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    needed, free = COPIES * adapter_bytes + OTHER_BYTES, shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            _(
                "{folder}: not enough disk space: this run may write {needed} MiB, but only {free} MiB are "
                "free. Free some space, or choose another --output.",
                folder=folder,
                needed=f"{needed / 2**20:,.1f}",
                free=f"{free / 2**20:,.1f}",
            )
        )


def _as_it_began(folder: Path, config: Config) -> Config:
    """The configuration in the folder; RunError names every value in which `config` differs from it.

    Only the device may be another one: where the run began there may be a card, and none here.
    """
    began = load_config(folder / CONFIG, {})
    before, now, open_ = _flat(located(began)), _flat(located(config)), _flat(Config())
    differing = [
        _("{key}: was {before!r}, now {now!r}", key=key, before=value, now=now[key])
        for key, value in before.items()
        if now[key] != value and key != "model.device" and not (key in LEFT_OPEN and now[key] == open_[key])
    ]
    if differing:
        raise RunError(
            _(
                "{folder}: a run must be resumed with the settings it was started with. Start a new run to use "
                "different settings.",
                folder=folder,
            ),
            *differing,
        )
    if now["model.device"] == open_["model.device"]:
        return began
    return began.model_copy(update={"model": began.model.model_copy(update={"device": config.model.device})})


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(exclude={"output"})
    return {f"{part}.{key}": value for part, values in sections.items() for key, value in values.items()}
