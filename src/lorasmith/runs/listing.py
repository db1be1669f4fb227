"""The runs in a folder, told by their files alone. Loads no torch.

A training holds a lock in its folder that ends with the process, however that ends, so a run that was killed is not
taken for one that goes on.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lorasmith.config.files import read_toml
from lorasmith.errors import LorasmithError, RunError
from lorasmith.i18n import _
from lorasmith.system.locking import is_locked
from lorasmith.training.files import ADAPTER, CHECKPOINTS, CONFIG, LOCK, METRICS, SUMMARY, checkpoints_in
from lorasmith.training.history import read_losses
from lorasmith.training.summary import Summary, read_summary

State = Literal["finished", "running", "interrupted", "broken"]


@dataclass(frozen=True)
class RunInfo:
    """One run. `step`: done so far; of an interrupted run, the one that --resume goes on after.

    Losses are held-out ones in nats a token, null where none was measured; `adapter_bytes` is null where no adapter was
    written; `date` is when the run last wrote something, ISO 8601; `problem` says why a run is broken.
    """

    run: str
    state: State
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
    """The runs in `folder`, or the one that it is; the newest first. Raises RunError where it is no folder."""
    if not folder.is_dir():
        raise RunError(_("{folder}: the folder does not exist. Give a folder that contains runs.", folder=folder))
    places = [folder] if (folder / CONFIG).is_file() else [path for path in folder.iterdir() if _is_run(path)]
    return sorted((_info(place) for place in places), key=lambda info: (info.date, info.run), reverse=True)


def _is_run(path: Path) -> bool:
    """What is listed: also a run that is broken."""
    known = (CONFIG, SUMMARY, METRICS)
    return path.is_dir() and not path.name.startswith(".") and any((path / name).is_file() for name in known)


def _info(run: Path) -> RunInfo:
    found: dict[str, Any] = {"base": "", "data": (), "step": _saved(run)}
    try:
        config = read_toml(run / CONFIG)
        found |= {"base": str(config["model"]["model"]), "data": tuple(map(str, config["data"]["data"]))}
        summary = read_summary(run)
        found |= _finished(summary) if summary else _unfinished(run)
    except LorasmithError as error:
        found |= {"state": "broken", "problem": str(error)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = _("{run}: a file in this run is not valid: {error!r}", run=run, error=error)
        found |= {"state": "broken", "problem": text}
    losses = {"loss_before": None, "loss_after": None}
    return RunInfo(str(run), **losses | found, adapter_bytes=_bytes(run), date=_date(run))


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
    training, measured = read_losses(run) if (run / METRICS).is_file() else ([], [])
    return {
        "state": "running" if running else "interrupted",
        "step": training[-1][0] if running and training else _saved(run),
        "loss_before": next((loss for step, loss in measured if step == 0), None),
        "loss_after": next((loss for step, loss in reversed(measured) if step), None),
    }


def _saved(run: Path) -> int:
    found = checkpoints_in(run / CHECKPOINTS)
    return found[-1][0] if found else 0


def _bytes(run: Path) -> int | None:
    """Of the adapter's weights: the finished one's, else the last checkpoint's."""
    places = [run / ADAPTER, *(place for _step, place in reversed(checkpoints_in(run / CHECKPOINTS)))]
    files = [place / "adapter_model.safetensors" for place in places]
    return next((file.stat().st_size for file in files if file.is_file()), None)


def _date(run: Path) -> str:
    """When it last wrote something: what is copied later does not make a run newer."""
    written = [path.stat().st_mtime for name in (CONFIG, METRICS, SUMMARY) if (path := run / name).is_file()]
    return datetime.fromtimestamp(max(written)).astimezone().isoformat(timespec="seconds")
