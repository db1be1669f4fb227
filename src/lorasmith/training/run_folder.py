"""A run's folder: which one, whether it may be used, what is written first, and what says that it is finished.

The files in it are listed in run.py.
"""

import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lorasmith.adapters.folder import lasting
from lorasmith.config.data import TEMPLATES
from lorasmith.config.files import parse_json
from lorasmith.config.toml import Config, load_config, to_toml
from lorasmith.data.dataset.mix import without_weight
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.runs.listing import CONFIG as CONFIG
from lorasmith.runs.listing import SUMMARY as SUMMARY
from lorasmith.runs.listing import is_in_use
from lorasmith.training.checkpoint import write_file, write_folder, writing
from lorasmith.training.distributed import World

ENVIRONMENT = "environment.json"
LEFT_OPEN = ("model.dtype", "model.device", "data.template", "data.max_length")  # their defaults say "you choose"
COPIES = 11  # of the adapter, at most at once: adapter/, two checkpoints with values and moments, two of the best
OTHER_BYTES = 2**20  # loss.png, metrics.jsonl and the like


@dataclass(frozen=True)
class Summary:
    """What a finished run came to. Losses in nats a token; they and best_step null where nothing was held out."""

    run: str
    loss_before: float | None
    loss_after: float | None
    interval: tuple[float, float] | None
    tokens_per_second: float
    peak_memory_mib: float
    seconds: float
    steps: int
    tokens: int
    trainable_parameters: int
    adapter_bytes: int
    base_bytes: int
    best_step: int | None = None  # of the adapter that is kept
    stopped_early: bool = False  # training.patience ran out

    def __str__(self) -> str:
        if self.loss_before is None or self.loss_after is None:
            return _("{steps} steps, no held-out examples", steps=self.steps)
        return _(
            "{steps} steps, held-out loss {before:.4f} -> {after:.4f}",
            steps=self.steps,
            before=self.loss_before,
            after=self.loss_after,
        )


def read_summary(folder: Path) -> Summary | None:
    """The summary of a finished run; None where the run is not finished."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    raw = parse_json(path.read_bytes())
    return Summary(**{**raw, "interval": tuple(raw["interval"]) if raw["interval"] else None})


def choose_folder(config: Config, world: World) -> Path:
    """The folder that `config` names, else runs/NAME-DATE: one for all processes."""
    if config.output:
        return Path(config.output).expanduser()
    name = Path(without_weight(config.data.data[0])[0]).stem.replace(":", "-") if config.data.data else "run"
    return Path(world.agree(str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")))


def resumed_config(output: str | Path) -> Path | None:
    """The file that a run in `output` goes on with; None where there is none."""
    began = Path(output).expanduser() / CONFIG
    return began if began.is_file() else None


def located(config: Config) -> Config:
    """`config` with the paths of its base, examples and template as they are from any working directory."""
    data, model = config.data, config.model
    files = tuple(lasting(name) + weight for name, weight in map(without_weight, data.data))
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


def check_folder(folder: Path, config: Config, resume: bool, overwrite: bool) -> Config:
    """What to train with, before anything is loaded: `config`, or what a resumed run began with.

    Raises RunError: a run is there and is not to be replaced, none is there to resume, it began otherwise, or it is
    being trained just now.
    """
    is_run, is_used = (folder / CONFIG).is_file(), folder.exists() and (folder.is_file() or any(folder.iterdir()))
    if (resume or overwrite) and is_in_use(folder):
        raise RunError(
            _("{folder}: another process is training this run. Wait for it to finish, or stop it.", folder=folder)
        )
    if resume:
        if not is_run:
            raise RunError(_("{folder}: no run to resume (config.toml not found).", folder=folder))
        return _as_it_began(folder, config)
    if folder.is_file():
        raise RunError(_("{folder} is a file, not a folder. Choose another --output.", folder=folder))
    if is_used and not overwrite:
        raise RunError(
            _(
                "{folder} already exists. Continue with --resume, replace it with --overwrite, or choose "
                "another --output (in Python: resume=True, overwrite=True, output=).",
                folder=folder,
            )
        )
    if is_used and not is_run:
        raise RunError(
            _(
                "{folder} is not a run folder (config.toml not found), so --overwrite will not replace it.",
                folder=folder,
            )
        )
    return config


def begin(folder: Path, config: Config, reasons: dict[str, str], environment: dict[str, str]) -> None:
    """Write what a run begins with, over the run that was there. Raises RunError."""

    def fill(target: Path) -> None:
        write_file(target / CONFIG, to_toml(config, reasons))
        write_file(target / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
        (target / "checkpoints").mkdir()

    if folder.is_dir():  # not renamed: it may be the working directory, or where a disk is mounted
        with writing(folder):
            _clear(folder)
            fill(folder)
    else:
        write_folder(folder, fill)


def _clear(folder: Path) -> None:
    """Remove a run: the summary first and the configuration not at all, so that what is left is an unfinished run."""
    (folder / SUMMARY).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG:
            path.unlink()


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
