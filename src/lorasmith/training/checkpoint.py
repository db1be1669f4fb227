"""A checkpoint: everything that the next step depends on, named only once it is whole (law 7)."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasmith.config.files import parse_json
from lorasmith.errors import RunError
from lorasmith.i18n import _, foreign
from lorasmith.system.cache import follow_umask
from lorasmith.training.optim import FlatParameters

VERSION = 1
STATE, TENSORS = "state.json", "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


@dataclass
class State:
    """How far a training is. The order of the data and the dropout follow from the step's number and the seed."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


@contextmanager
def writing(path: Path, is_run: bool = True) -> Iterator[None]:
    """Within it, a disk that refuses (full, over quota, read-only) is a RunError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = foreign(error.strerror) if isinstance(error, OSError) and error.strerror else error
        text = _(
            "{path}: cannot be written: {why}. Files that were complete before are unchanged. Free some space "
            "or choose another --output",
            path=path,
            why=why,
        )
        raise RunError(
            text + (_("; use --resume to continue a run that has already started.") if is_run else ".")
        ) from error


def write_folder(folder: Path, fill: Callable[[Path], None], is_run: bool = True) -> None:
    """Fill a hidden folder beside `folder`, then give it the name in one move: half-written, it never has it.

    `is_run`: it is part of a run, which a RunError then says how to go on with.
    """
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with writing(folder, is_run):
            staging.mkdir(parents=True)
            fill(staging)
            follow_umask(staging)
            if folder.exists():
                old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
                folder.rename(old)
                staging.rename(folder)
                shutil.rmtree(old)
            else:
                staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, text: str, is_run: bool = True) -> None:
    """Write a file under another name, then rename it; `is_run` as for `write_folder`."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path, is_run):
            staging.write_text(text, "utf-8")
            staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written in a run folder."""
    for left in [*run.glob(".*"), *run.glob("checkpoints/.*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def save(
    checkpoints: Path, state: State, parameters: FlatParameters, optimizer: torch.optim.Optimizer,
    settings: dict[str, str], write_adapter: Callable[[Path], None],
) -> Path:  # fmt: skip
    """Write checkpoints/step-N, an adapter folder with the optimiser's state in it.

    Other ones, and what was the best at other times, go once it is whole.
    """

    def fill(folder: Path) -> None:
        write_adapter(folder)
        moments = optimizer.state[parameters.values]
        tensors = {
            "values": parameters.values.detach(),
            **{name: moments[name] for name in MOMENTS},
        }
        save_file({name: t.cpu().clone() for name, t in tensors.items()}, folder / TENSORS)
        text = json.dumps({"version": VERSION, "settings": settings, **asdict(state)}, indent=2)
        (folder / STATE).write_text(text + "\n", "utf-8")

    folder = checkpoints / f"step-{state.step:06d}"
    write_folder(folder, fill)
    for other in [*checkpoints.glob("step-*"), *checkpoints.glob("best-*")]:
        if other.name not in (folder.name, best_name(state)):
            shutil.rmtree(other)
    return folder


def best_name(state: State) -> str:
    """The name of the best adapter's folder: by its step, so that an older checkpoint still finds its own."""
    return f"best-{state.best_step or 0:06d}"


def latest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max(checkpoints.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def read_state(folder: Path) -> tuple[State, dict[str, str]]:
    """State and recorded settings of a checkpoint. Raises RunError where it is of another version or broken."""
    try:
        raw = dict(parse_json((folder / STATE).read_bytes()))
        version = raw.pop("version")
        if version != VERSION:
            raise RunError(
                _(
                    "{path}: written by another version ({version}); this version of lorasmith reads {known}. "
                    "Start again with --overwrite.",
                    path=folder / STATE,
                    version=version,
                    known=VERSION,
                )
            )
        settings = dict(raw.pop("settings"))
        return State(**raw), settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=folder / STATE, error=error)
        ) from None


@torch.no_grad()
def restore(folder: Path, parameters: FlatParameters, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Put the tensors of a checkpoint back into parameters and optimiser. Raises RunError where they do not fit."""
    try:
        tensors = load_file(folder / TENSORS)
        values, *moments = (tensors[name] for name in ("values", *MOMENTS))
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=folder / TENSORS, error=error)
        ) from None
    if any(tensor.shape != parameters.values.shape for tensor in (values, *moments)):
        raise RunError(
            _(
                "{folder}: the saved adapter does not have the size of the configured one. Start again with "
                "--overwrite.",
                folder=folder,
            )
        )
    parameters.values.copy_(values)
    device = parameters.values.device
    optimizer.state[parameters.values] = {"step": torch.tensor(float(step), device=device)} | {
        name: moment.to(device) for name, moment in zip(MOMENTS, moments, strict=True)
    }
