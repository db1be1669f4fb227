"""The folder of a run: choosing and locking it, checking that it may be used or resumed, and writing its first files.

runs/train.py lists the files of a run folder, and run_files.py defines their names.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import absolute_if_exists
from lorasmith.config.data import TEMPLATES
from lorasmith.config.toml import Config, load_config, to_toml
from lorasmith.config.values import read_back
from lorasmith.data.dataset.sources import split_source
from lorasmith.errors import ConfigError, RunError
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.system.locking import locked
from lorasmith.system.ownership import MARKER, foreign_entries, is_marked, mark, remove_own, short_list
from lorasmith.system.writing import remove, sync, write_file, writing
from lorasmith.training.distributed import World
from lorasmith.training.run_files import (
    CHECKPOINTS,
    ENVIRONMENT,
    GROUP_CONFIG,
    LOCK,
    RUN_CONFIG,
    SUMMARY,
    is_leftover,
    is_run,
    is_run_file,
    recover_run,
)

# Options that trackers do not get, because they may contain the user's texts, or paths.
PRIVATE = ("data.data", "data.fill", "data.system", "training.start_from", "training.samples", "training.metric")
# Options whose default lets the first start choose; config.toml then holds the choice.
CHOSEN_AT_START = ("model.dtype", "model.device", "data.template", "data.max_length")
OTHER_BYTES = 2**20  # for loss.png, metrics.jsonl and the like


def choose_folder(config: Config, world: World) -> Path:
    """The folder that `config` names, or runs/NAME-DATE; the same in all processes."""
    if config.output:
        return Path(config.output).expanduser()
    name = Path(split_source(config.data.data[0])[0]).stem.replace(":", "-") if config.data.data else "run"
    return Path(world.broadcast(str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")))


def resumed_config(output: str | Path) -> Path | None:
    """The file with which the run in `output`, or several of them, are resumed; None if there is none."""
    folder = Path(output).expanduser()
    return next((path for path in (folder / RUN_CONFIG, folder / GROUP_CONFIG) if path.is_file()), None)


def with_absolute_paths(config: Config) -> Config:
    """`config` with absolute paths of files and folders, so that any working directory will do."""
    data, model = config.data, config.model
    files = tuple(map(_absolute_source, data.data))
    share = _absolute_source(data.held_out) if isinstance(data.held_out, str) else data.held_out
    template = data.template if data.template in TEMPLATES else absolute_if_exists(data.template)
    metric, start = tuple(map(_absolute_function, config.training.metric)), config.training.start_from
    training = {"metric": metric, "start_from": start and absolute_if_exists(start)}
    return config.model_copy(
        update={
            "data": data.model_copy(update={"data": files, "held_out": share, "template": template}),
            "model": model.model_copy(update={"model": absolute_if_exists(model.model)}),
            "training": config.training.model_copy(update=training),
        }
    )


def _absolute_source(word: str) -> str:
    """FILE#ROWS:WEIGHT with an absolute path; names of datasets on a hub stay."""
    name, numbers = split_source(word)
    return absolute_if_exists(name) + numbers


def _absolute_function(text: str) -> str:
    """FILE.py:FUNCTION with an absolute path."""
    file, colon, name = text.rpartition(":")
    return absolute_if_exists(file) + colon + name


@contextmanager
def run_lock(folder: Path, world: World, report: Report, resume: bool) -> Iterator[None]:
    """Hold the folder's lock, which keeps other trainings out and makes `list` show the run as running.

    The first process takes it for all. Raises RunError, in every process, if another training holds the lock or the
    folder cannot be written.
    """
    with ExitStack() as stack:
        problem = ""
        if world.is_first:
            try:
                stack.enter_context(_locked(folder, report, resume))
            except RunError as error:
                problem = str(error)
        problem = world.broadcast(problem)
        if problem:
            raise RunError(problem)
        yield


@contextmanager
def _locked(folder: Path, report: Report, resume: bool) -> Iterator[None]:
    """Hold the lock in this process. Raises RunError."""
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
                    "{folder}: this file system does not support locks, so a second training run could "
                    "write into this folder too. Do not start one there.",
                    folder=folder,
                )
            )
        yield


def check_folder(folder: Path, config: Config, resume: bool, overwrite: bool) -> Config:
    """Check that the folder may be used, before anything is loaded; returns `config`, or that of the resumed run.

    Raises RunError if the folder is in use and neither flag is given, if there is no run to resume or it was started
    with other settings, or if --overwrite would remove the adapter to start from, or anything that lorasmith did not
    write.
    """
    if resume:
        if not is_run(folder):
            raise _nothing_to_resume(folder)
        return _resumed_config(folder, config)
    if folder.exists() and not folder.is_dir():
        raise RunError(_("{folder} is a file, not a folder. Choose another --output.", folder=folder))
    if not _is_used(folder):
        return config
    _require_replaceable(folder, config, overwrite)
    return config


def run_id(folder: Path) -> str:
    """An id of the run in `folder`, which stays the same when it is resumed; other runs in this folder have others."""
    try:
        found = read_back(folder / ENVIRONMENT, dict[str, str])
    except (OSError, ValueError):
        found = {}
    return found.get("run_id") or sha256(str(folder.absolute()).encode()).hexdigest()[:32]  # before there were ids


def _nothing_to_resume(folder: Path) -> RunError:
    if (folder / RUN_CONFIG).is_file():
        text = _(
            "{folder}: no run to resume there: its config.toml was not written by `lorasmith train`.",
            folder=folder,
        )
        return RunError(text)
    return RunError(_("{folder}: no run to resume (config.toml not found).", folder=folder))


def _is_used(folder: Path) -> bool:
    """Whether the folder contains anything but a lock, leftovers, or the first files of a run killed at its start."""
    if not folder.is_dir():
        return False
    first = {LOCK, *((MARKER, ENVIRONMENT) if is_marked(folder, "run") else ())}
    return any(path.name not in first and not is_leftover(path.name) for path in folder.iterdir())


def _require_replaceable(folder: Path, config: Config, overwrite: bool) -> None:
    """Raise RunError without --overwrite, or if the folder is not a run or contains what must not be removed.

    That is what training does not write, and the adapter from which this training starts.
    """
    if not overwrite:
        raise RunError(
            _(
                "{folder} already exists. Continue with --resume, replace it with --overwrite, or choose "
                "another --output (in Python: resume=True, overwrite=True, output=).",
                folder=folder,
            )
        )
    if not (is_marked(folder, "run") or _is_run_of_0_1_0(folder)):
        raise RunError(
            _(
                "{folder} was not written by `lorasmith train`, so --overwrite does not replace it. Choose another "
                "--output, or remove the folder yourself.",
                folder=folder,
            )
        )
    start = config.training.start_from
    if start is not None and Path(start).expanduser().resolve().is_relative_to(folder.resolve()):
        raise RunError(
            _(
                "{folder} contains files that are still needed ({part}). Choose another --output.",
                folder=folder,
                part=start,
            )
        )
    if others := foreign_entries(folder, is_run_file):
        raise RunError(
            _(
                "{folder} contains {names}, which lorasmith did not write, so --overwrite does not replace it. Move "
                "what you want to keep, remove the rest, or choose another --output.",
                folder=folder,
                names=short_list(others),
            )
        )


def _is_run_of_0_1_0(folder: Path) -> bool:
    """Whether version 0.1.0, which wrote no marker, created this run; its first two files tell."""
    try:
        load_config(folder / RUN_CONFIG, {})
        return read_back(folder / ENVIRONMENT, dict[str, str]).keys() >= {"lorasmith", "train_sha256"}
    except (ConfigError, OSError, ValueError):
        return False


def start_run(
    folder: Path, config: Config, reasons: dict[str, str], environment: dict[str, str], overwrite: bool = False
) -> None:
    """Write the first files of a run; `overwrite` replaces a previous run in the folder. Raises RunError.

    reasons: comments for config.toml, by key. environment: the content of environment.json.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if _is_used(folder):
            _require_replaceable(
                folder, config, overwrite
            )  # again: files may have appeared while the base model was loading
            mark(folder, "run")
            remove(folder / SUMMARY)  # first, and keep config.toml: a kill then leaves an unfinished run
            remove_own(folder, is_run_file, keep=frozenset({MARKER, LOCK, RUN_CONFIG}))
        mark(folder, "run")
        recover_run(folder)
        write_file(folder / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
        write_file(folder / RUN_CONFIG, to_toml(config, reasons))
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        sync(folder)
        sync(folder.absolute().parent)


def check_space(folder: Path, run_bytes: int) -> None:
    """Raise RunError if the disk has less space than a run can need.

    run_bytes: of its weights and checkpoints; see `loop.disk_bytes`.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    needed, free = run_bytes + OTHER_BYTES, shutil.disk_usage(existing).free
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


def _resumed_config(folder: Path, config: Config) -> Config:
    """The configuration that the run in `folder` was started with.

    Raises RunError that names every value in which `config` differs from it. Only the device may change, because the
    run may continue on a machine without the same GPU.
    """
    saved, default = load_config(folder / RUN_CONFIG, {}), flat_options(Config())
    before, now = flat_options(with_absolute_paths(saved)), flat_options(with_absolute_paths(config))
    chosen_rate = config.training.learning_rate == "auto" or "learning_rate" not in config.training.model_fields_set
    differing = [
        _("{key}: was {before!r}, now {now!r}", key=key, before=value, now=now[key])
        for key, value in before.items()
        if now[key] != value
        and key != "model.device"
        and not (key in CHOSEN_AT_START and now[key] == default[key])
        and not (key == "training.learning_rate" and chosen_rate)
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
    if now["model.device"] == default["model.device"]:
        return saved
    return saved.model_copy(update={"model": saved.model.model_copy(update={"device": config.model.device})})


def flat_options(config: Config) -> dict[str, Any]:
    """Every option but `output` by its whole key, such as 'training.seed'."""
    sections = config.model_dump(exclude={"output"})
    return {f"{part}.{key}": value for part, values in sections.items() for key, value in values.items()}


def public_options(config: Config) -> dict[str, Any]:
    """`flat_options` without texts of the user and without paths, for trackers."""
    return {
        key: value
        for key, value in flat_options(with_absolute_paths(config)).items()
        if key not in PRIVATE and not (isinstance(value, str) and Path(value).is_absolute())
    }
