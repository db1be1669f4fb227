"""A checkpoint: everything that the next step depends on, named only once it is whole (law 7)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.system.writing import discard, write_folder, writing
from lorasmith.training.files import CHECKPOINT_FILES, STATE, TENSORS, checkpoint_name, checkpoints_in
from lorasmith.training.optim import FlatParameters

VERSION, READ = 2, (1, 2)  # 1 had no options
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


@dataclass
class State:
    """How far a training is. The order of the data and the dropout follow from the step's number and the seed."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Origin:
    """Which training a checkpoint is of: settings of machine, base and examples; options that decide the adapter."""

    settings: dict[str, str]
    options: dict[str, str]


class _Version(BaseModel):
    version: int


class _Saved(BaseModel):
    """What state.json holds."""

    settings: dict[str, str]
    options: dict[str, str] = {}
    step: PositiveInt
    tokens: PositiveInt
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    best_loss: Annotated[float, Field(allow_inf_nan=False)] | None
    best_step: PositiveInt | None


def save(
    checkpoints: Path, state: State, parameters: FlatParameters, optimizer: torch.optim.Optimizer,
    origin: Origin, write_adapter: Callable[[Path], None],
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
        text = json.dumps({"version": VERSION, **asdict(origin), **asdict(state)}, indent=2)
        (folder / STATE).write_text(text + "\n", "utf-8")

    folder = checkpoints / checkpoint_name(state.step)
    write_folder(folder, fill)
    for _step, other in [*checkpoints_in(checkpoints), *checkpoints_in(checkpoints, "best")]:
        if other.name not in (folder.name, best_name(state)):
            _drop(other)
    return folder


def _drop(folder: Path) -> None:
    """Remove a checkpoint, unless somebody keeps a file of their own in it."""
    with writing(folder):
        if {path.name for path in folder.iterdir()} <= CHECKPOINT_FILES:
            discard(folder)


def best_name(state: State) -> str:
    """The name of the best adapter's folder: by its step, so that an older checkpoint still finds its own."""
    return checkpoint_name(state.best_step or 0, "best")


def latest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = checkpoints_in(checkpoints)
    return found[-1][1] if found else None


def read_state(folder: Path) -> tuple[State, Origin]:
    """State and origin of a checkpoint. Raises RunError where it is of another version or broken."""
    path = folder / STATE
    try:
        version = read_back(path, _Version).version
        if version not in READ:
            raise RunError(
                _(
                    "{path}: written by another version ({version}); this version of lorasmith reads {known}. "
                    "Start again with --overwrite.",
                    path=path,
                    version=version,
                    known=", ".join(map(str, READ)),
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
def restore(folder: Path, parameters: FlatParameters, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Put the tensors of a checkpoint back into parameters and optimiser. Raises RunError where they do not fit."""
    try:
        tensors = load_file(folder / TENSORS)
        values, *moments = (tensors[name] for name in ("values", *MOMENTS))
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(
            _("{path}: cannot be read: {error}. Start again with --overwrite.", path=folder / TENSORS, error=error)
        ) from None
    wanted = parameters.values
    if any((tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype) for tensor in (values, *moments)):
        raise RunError(
            _(
                "{folder}: the saved adapter does not have the size of the configured one. Start again with "
                "--overwrite.",
                folder=folder,
            )
        )
    parameters.values.copy_(values)
    parameters.changed()
    device = parameters.values.device
    optimizer.state[parameters.values] = {"step": torch.tensor(float(step), device=device)} | {
        name: moment.to(device) for name, moment in zip(MOMENTS, moments, strict=True)
    }
