"""The names of all that a training writes into a run folder; what has another is somebody else's. Loads no torch."""

import re
from pathlib import Path, PurePath

from lorasmith.system.ownership import MARKER, is_marked
from lorasmith.system.writing import LEFTOVER, recover, writing

CONFIG, ENVIRONMENT, SUMMARY, PICTURE = "config.toml", "environment.json", "summary.json", "loss.png"
LOCK = f"{MARKER}.lock"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "tensorboard"
ANSWERS = "samples.json"  # the demo's
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
STATE, TENSORS = "state.json", "state.safetensors"

ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors", "lorasmith.json"})
CHECKPOINT_FILES = ADAPTER_FILES | {STATE, TENSORS}
TOP = frozenset({
    MARKER, LOCK, CONFIG, ENVIRONMENT, SUMMARY, PICTURE, METRICS, SAMPLES, ANSWERS, EVENTS, ADAPTER, CHECKPOINTS,
})  # fmt: skip
_CHECKPOINT = re.compile(r"(step|best)-([0-9]{6,15})")
# Beside the names of today: what a process of 0.1.0 left that was killed while it wrote.
_LEFTOVERS = (LEFTOVER, re.compile(r"\.(?P<name>.+?)\.(?:(?P<old>old)\.)?[0-9]+", re.DOTALL))


def checkpoint_name(step: int, kind: str = "step") -> str:
    """The folder of the checkpoint after `step` steps; of the best adapter with the kind `best`."""
    return f"{kind}-{step:06d}"


def checkpoints_in(folder: Path, kind: str = "step") -> list[tuple[int, Path]]:
    """The checkpoints in a folder by their steps, rising: folders that have exactly such a name, and no links."""
    found = [(step, path) for path in folder.glob(f"{kind}-*") if (step := _step(path.name)) is not None]
    return sorted((step, path) for step, path in found if path.is_dir() and not path.is_symlink())


def is_run(folder: Path) -> bool:
    """Whether a training wrote this folder: by its marker, or, before there was one, by several of its files."""
    if is_marked(folder, "run"):
        return (folder / CONFIG).is_file()
    others = (ENVIRONMENT, METRICS, SUMMARY, f"{ADAPTER}/lorasmith.json")
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in others)


def is_of_run(path: PurePath) -> bool:
    """Whether a training writes something of this name; a path from the run's folder."""
    if any(is_leftover(part) for part in path.parts[:2]):
        return True
    match path.parts:
        case (name,):
            return name in TOP
        case ("adapter", name):
            return name in ADAPTER_FILES
        case ("tensorboard", name):
            return name.startswith("events.out.tfevents.")
        case ("checkpoints", name):
            return _step(name) is not None
        case ("checkpoints", _, name):
            return name in CHECKPOINT_FILES
    return False


def is_leftover(name: str) -> bool:
    """Whether it is what a killed training left half-written."""
    return any((found := form.fullmatch(name)) and _is_ours(found["name"]) for form in _LEFTOVERS)


def recover_run(folder: Path) -> None:
    """Undo what a killed training left half-done. Nobody else may be training there. Raises RunError."""
    for place in (folder, folder / CHECKPOINTS):
        if place == folder or (place.is_dir() and not place.is_symlink()):
            for leftover in _LEFTOVERS:
                with writing(place):
                    recover(place, _is_ours, leftover)


def _step(name: str) -> int | None:
    found = _CHECKPOINT.fullmatch(name)
    return int(found[2]) if found and name == checkpoint_name(int(found[2]), found[1]) else None


def _is_ours(name: str) -> bool:
    return name in TOP or _step(name) is not None
