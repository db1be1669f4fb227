"""What a run folder contains: the name of every file that training writes, and the summary of a finished run.

An entry with any other name belongs to somebody else and is never touched. Loads no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.system.ownership import MARKER, is_marked
from lorasmith.system.writing import LEFTOVER, recover, writing

RUN_CONFIG, ENVIRONMENT, SUMMARY, LOSS_PLOT = "config.toml", "environment.json", "summary.json", "loss.png"
REPORT = "report.html"  # written by `lorasmith report`
LOCK = f"{MARKER}.lock"
GROUP_CONFIG = "adapters.toml"  # in the folder of several runs that are trained at once
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "tensorboard"
DEMO_SAMPLES = "samples.json"  # written by `lorasmith demo`
REFERENCE = "reference.safetensors"  # what the model said of preferences before the training
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
STATE, TENSORS = "state.json", "state.safetensors"

# What a tokenizer is saved as, beside an adapter with added tokens.
TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
})  # fmt: skip
ADAPTER_FILES = TOKENIZER_FILES | {"adapter_config.json", "adapter_model.safetensors", "lorasmith.json"}
# of a whole model; a model with code of its own has .py files, too
MODEL_FILES = TOKENIZER_FILES | {"config.json", "generation_config.json", "model.safetensors"}
CHECKPOINT_FILES = ADAPTER_FILES | MODEL_FILES | {STATE, TENSORS}
TOP_LEVEL = frozenset({
    MARKER, LOCK, RUN_CONFIG, ENVIRONMENT, SUMMARY, LOSS_PLOT, METRICS, SAMPLES, DEMO_SAMPLES, EVENTS, REFERENCE,
    ADAPTER, MODEL, CHECKPOINTS, REPORT,
})  # fmt: skip
_CHECKPOINT = re.compile(r"(step|best)-([0-9]{6,15})")
# The second form was left behind by version 0.1.0 when it was killed while writing.
_LEFTOVERS = (LEFTOVER, re.compile(r"\.(?P<name>.+?)\.(?:(?P<old>old)\.)?[0-9]+", re.DOTALL))


@dataclass(frozen=True)
class Summary:
    """The results of a finished run, as stored in RUN/summary.json.

    Losses are in nats per token, those of preferences in nats per row. The losses, the interval and `best_step` are
    None if nothing was held out, and the accuracy and the margin also if the training was on examples.
    """

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
    best_step: int | None = None  # the step of the adapter that was kept
    stopped_early: bool = False  # training.patience ran out; not written before version 0.2
    train_examples: int | None = None  # these two are not written before version 0.2
    held_out_examples: int | None = None
    accuracy: float | None = None  # part of the held-out rows whose chosen answer has the larger reward
    accuracy_interval: tuple[float, float] | None = None
    margin: float | None = None  # of the rewards
    margin_interval: tuple[float, float] | None = None

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
    """The summary of the run in `folder`, or None if the run has not finished. Raises RunError if it is broken."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        return read_back(path, Summary)
    except (OSError, ValueError) as error:
        raise RunError(
            _(
                "{path}: not in the format that training writes: {error}. Remove the file; "
                "--resume then writes it again.",
                path=path,
                error=error,
            )
        ) from None


def checkpoint_name(step: int, kind: str = "step") -> str:
    """The folder name of the checkpoint after `step` steps, or, with the kind `best`, of the best adapter so far."""
    return f"{kind}-{step:06d}"


def checkpoints_in(folder: Path, kind: str = "step") -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of this kind in `folder`, in order of steps.

    Only real folders with exactly the name that `checkpoint_name` gives count; links do not.
    """
    found = [(step, path) for path in folder.glob(f"{kind}-*") if (step := _step(path.name)) is not None]
    return sorted((step, path) for step, path in found if path.is_dir() and not path.is_symlink())


def is_run(folder: Path) -> bool:
    """Whether training wrote this folder: it has our marker, or, from before there was one, several of our files."""
    if is_marked(folder, "run"):
        return (folder / RUN_CONFIG).is_file()
    others = (ENVIRONMENT, METRICS, SUMMARY, f"{ADAPTER}/lorasmith.json")
    return (folder / RUN_CONFIG).is_file() and any((folder / name).is_file() for name in others)


def is_run_file(path: PurePath) -> bool:
    """Whether training writes a file or folder of this name; `path` is relative to the run folder."""
    if any(is_leftover(part) for part in path.parts[:2]):
        return True
    match path.parts:
        case (name,):
            return name in TOP_LEVEL
        case ("adapter", name):
            return name in ADAPTER_FILES
        case ("model", name):
            return is_model_file(name)
        case ("tensorboard", name):
            return name.startswith("events.out.tfevents.")
        case ("checkpoints", name):
            return _step(name) is not None
        case ("checkpoints", _, name):
            return is_checkpoint_file(name)
    return False


def is_model_file(name: str) -> bool:
    """Whether a whole model has a file of this name."""
    return name in MODEL_FILES or name.endswith(".py")


def is_checkpoint_file(name: str) -> bool:
    """Whether a checkpoint has a file of this name."""
    return name in CHECKPOINT_FILES or is_model_file(name)


def is_leftover(name: str) -> bool:
    """Whether this is the name of an incomplete file or folder that a killed training left behind."""
    return any((found := form.fullmatch(name)) and _is_ours(found["name"]) for form in _LEFTOVERS)


def recover_run(folder: Path) -> None:
    """Clean up after a killed training: restore replaced folders and remove incomplete ones.

    The caller must hold the run's lock. Raises RunError if the disk refuses.
    """
    for place in (folder, folder / CHECKPOINTS):
        if place == folder or (place.is_dir() and not place.is_symlink()):
            for leftover in _LEFTOVERS:
                with writing(place):
                    recover(place, _is_ours, leftover)


def _step(name: str) -> int | None:
    found = _CHECKPOINT.fullmatch(name)
    return int(found[2]) if found and name == checkpoint_name(int(found[2]), found[1]) else None


def _is_ours(name: str) -> bool:
    return name in TOP_LEVEL or _step(name) is not None
