"""The runs in a folder and their states, read from their files. Loads no torch.

A run counts as running only while a process holds its lock, so a killed run is never shown as running.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lorasmith.config.files import read_toml
from lorasmith.errors import LorasmithError, RunError
from lorasmith.i18n import _
from lorasmith.system.locking import is_locked
from lorasmith.training.history import read_losses
from lorasmith.training.run_files import (
    ADAPTER,
    CHECKPOINTS,
    LOCK,
    METRICS,
    MODEL,
    RUN_CONFIG,
    SUMMARY,
    Summary,
    checkpoints_in,
    read_summary,
)

RunState = Literal["finished", "running", "interrupted", "broken"]


@dataclass(frozen=True)
class RunInfo:
    """One run, as `lorasmith list` shows it.

    step: steps done; for an interrupted run, the step after which --resume continues.
    loss_before, loss_after: held-out loss in nats per token, of the base model and of the last evaluation.
    adapter_bytes: size of the final weights or the newest checkpoint's; None if nothing has been saved.
    date: when the run last wrote something, in ISO 8601.
    problem: why the run is broken.
    """

    run: str
    state: RunState
    step: int
    base: str
    data: tuple[str, ...]
    loss_before: float | None
    loss_after: float | None
    adapter_bytes: int | None
    date: str
    stopped_early: bool = False
    problem: str = ""


def find_runs(folder: Path) -> list[RunInfo]:
    """The runs in `folder`, newest first, or the run that `folder` itself is. Raises RunError if it does not exist."""
    if not folder.is_dir():
        raise RunError(_("{folder}: the folder does not exist. Give a folder that contains runs.", folder=folder))
    runs = [folder] if (folder / RUN_CONFIG).is_file() else [path for path in folder.iterdir() if _is_listed(path)]
    return sorted((_info(run) for run in runs), key=lambda info: (info.date, info.run), reverse=True)


def _is_listed(path: Path) -> bool:
    """Whether to list this folder, possibly as a broken run."""
    known = (RUN_CONFIG, SUMMARY, METRICS)
    return path.is_dir() and not path.name.startswith(".") and any((path / name).is_file() for name in known)


def _info(run: Path) -> RunInfo:
    fields: dict[str, Any] = {"base": "", "data": (), "step": _last_checkpoint(run)}
    try:
        config = read_toml(run / RUN_CONFIG)
        fields |= {"base": str(config["model"]["model"]), "data": tuple(map(str, config["data"]["data"]))}
        summary = read_summary(run)
        fields |= _finished(summary) if summary else _unfinished(run)
    except LorasmithError as error:
        fields |= {"state": "broken", "problem": str(error)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = _("{run}: a file in this run is not valid: {error!r}", run=run, error=error)
        fields |= {"state": "broken", "problem": text}
    losses = {"loss_before": None, "loss_after": None}
    return RunInfo(str(run), **losses | fields, adapter_bytes=_bytes(run), date=_date(run))


def _finished(summary: Summary) -> dict[str, Any]:
    return {
        "state": "finished",
        "step": summary.steps,
        "loss_before": summary.loss_before,
        "loss_after": summary.loss_after,
        "stopped_early": summary.stopped_early,
    }


def _unfinished(run: Path) -> dict[str, Any]:
    running = is_locked(run / LOCK)
    training, held_out = read_losses(run) if (run / METRICS).is_file() else ([], [])
    return {
        "state": "running" if running else "interrupted",
        "step": training[-1][0] if running and training else _last_checkpoint(run),
        "loss_before": next((loss for step, loss in held_out if step == 0), None),
        "loss_after": next((loss for step, loss in reversed(held_out) if step), None),
    }


def _last_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    found = checkpoints_in(run / CHECKPOINTS)
    return found[-1][0] if found else 0


def _bytes(run: Path) -> int | None:
    """The size of the final adapter's weights, or of those in the newest checkpoint."""
    if (whole := run / MODEL / "model.safetensors").is_file():
        return whole.stat().st_size
    places = [run / ADAPTER, *(place for _step, place in reversed(checkpoints_in(run / CHECKPOINTS)))]
    files = [place / "adapter_model.safetensors" for place in places]
    return next((file.stat().st_size for file in files if file.is_file()), None)


def _date(run: Path) -> str:
    """When the run last wrote something, by the files that only training writes; copying other files does not count."""
    written = [path.stat().st_mtime for name in (RUN_CONFIG, METRICS, SUMMARY) if (path := run / name).is_file()]
    return datetime.fromtimestamp(max(written)).astimezone().isoformat(timespec="seconds")
