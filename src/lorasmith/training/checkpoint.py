"""Checkpoints: everything that the next step needs, so that a resumed run equals an uninterrupted one bit for bit."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.system.writing import discard, write_folder, writing
from lorasmith.training.artifact import Artifact
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import Optimizer
from lorasmith.training.run_files import STATE, TENSORS, checkpoint_name, checkpoints_in, is_checkpoint_file

VERSION, READABLE = 2, (1, 2)  # version 1 did not contain options


@dataclass
class State:
    """The progress of a training. The order of the data and dropout follow from the step and the seed alone."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Origin:
    """What identifies a training: settings of machine, base model and data, and the options that affect the adapter."""

    settings: dict[str, str]
    options: dict[str, str]


class _Version(BaseModel):
    version: int


class _Saved(BaseModel):
    """The content of state.json."""

    settings: dict[str, str]
    options: dict[str, str] = {}
    step: PositiveInt
    tokens: PositiveInt
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    best_loss: Annotated[float, Field(allow_inf_nan=False)] | None
    best_step: PositiveInt | None


def save(
    checkpoints: Path, state: State, parameters: FlatParameters, optimizer: Optimizer,
    origin: Origin, artifact: Artifact,
) -> Path:  # fmt: skip
    """Write checkpoints/step-NNNNNN and return it: the optimizer's state, and the adapter if one is trained.

    Raises RunError.
    """

    def fill(folder: Path) -> None:
        if artifact.in_checkpoints:
            artifact.write(folder)
        save_file(_apart({"values": parameters.values.detach(), **optimizer.tensors()}), folder / TENSORS)
        text = json.dumps({"version": VERSION, **asdict(origin), **asdict(state)}, indent=2)
        (folder / STATE).write_text(text + "\n", "utf-8")

    folder = checkpoints / checkpoint_name(state.step)
    write_folder(folder, fill)
    return folder


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own, as safetensors demands; those that are so are not copied."""
    found, used = dict[str, Tensor](), set[int]()
    for name, t in tensors.items():
        own = t.cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in used else own
        used.add(place)
    return found


def drop_old(checkpoints: Path, state: State, keep: int) -> None:
    """Remove all but the last `keep` checkpoints (0: none), and the best adapters that none of these needs.

    state: what the newest checkpoint holds. Raises RunError.
    """
    saved, best = checkpoints_in(checkpoints), checkpoints_in(checkpoints, "best")
    older = [step for step, _folder in saved[-keep:] if step < state.step]
    needed = {state.best_step, *(step for saved_at in older for step in _possible_best(saved_at, best))}
    for _step, folder in [*(saved[:-keep] if keep else []), *(one for one in best if one[0] not in needed)]:
        _drop(folder)


def _possible_best(saved_at: int, best: list[tuple[int, Path]]) -> list[int]:
    """The steps of the best adapters to which the checkpoint of step `saved_at` can refer.

    That is the newest one so far; an adapter of the same step may have been evaluated before or after it was saved.
    """
    return [max((step for step, _folder in best if step < most), default=0) for most in (saved_at, saved_at + 1)]


def _drop(folder: Path) -> None:
    """Remove a checkpoint, unless it contains a file that lorasmith did not write."""
    with writing(folder):
        if all(is_checkpoint_file(path.name) for path in folder.iterdir()):
            discard(folder)


def best_name(state: State) -> str:
    """The name of the best adapter's folder. It contains the step, so that an older checkpoint still finds its own."""
    return checkpoint_name(state.best_step or 0, "best")


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints_in(checkpoints)
    return found[-1][1] if found else None


def read_state(folder: Path) -> tuple[State, Origin]:
    """The state and origin of a checkpoint. Raises RunError if it is broken or of an unsupported version."""
    path = folder / STATE
    try:
        version = read_back(path, _Version).version
        if version not in READABLE:
            raise RunError(
                _(
                    "{path}: written by another version ({version}); this version of lorasmith reads {known}. "
                    "Start again with --overwrite.",
                    path=path,
                    version=version,
                    known=", ".join(map(str, READABLE)),
                )
            )
        saved = read_back(path, _Saved)
        if folder.name != checkpoint_name(saved.step):
            raise ValueError(_("it belongs to step {step}", step=saved.step))
        if (saved.best_loss is not None and saved.best_step is None) or (saved.best_step or 0) > saved.step:
            raise ValueError(_("best_loss and best_step contradict each other"))
    except (OSError, ValueError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=path, error=error)
        ) from None
    state = State(**saved.model_dump(exclude={"settings", "options"}))
    return state, Origin(saved.settings, saved.options)


@torch.no_grad()
def restore(folder: Path, parameters: FlatParameters, optimizer: Optimizer, step: int) -> None:
    """Load the tensors of a checkpoint into parameters and optimizer. Raises RunError if they do not fit."""
    try:
        tensors = load_file(folder / TENSORS)
        values, own = tensors["values"], parameters.values
        if (values.shape, values.dtype) != (own.shape, own.dtype):
            raise ValueError("values")
        optimizer.restore(tensors, step)
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=folder / TENSORS, error=error)
        ) from None
    except ValueError:
        raise RunError(
            _(
                "{folder}: the saved adapter does not have the size of the configured one. Start again with "
                "--overwrite.",
                folder=folder,
            )
        ) from None
    own.copy_(values)
    parameters.changed(step)
