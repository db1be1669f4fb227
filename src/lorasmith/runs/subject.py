"""What a report is about: a finished run, an unfinished one with a checkpoint, or an adapter folder alone.

A run that trained all weights must be finished: a checkpoint of it cannot be opened as a model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorasmith.adapters.folder import find_adapter, find_model
from lorasmith.config.files import read_object, read_objects
from lorasmith.config.preference import METHODS
from lorasmith.config.toml import Config, load_config
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.system.locking import is_locked
from lorasmith.training.history import Points, read_losses
from lorasmith.training.run_files import (
    ADAPTER,
    CHECKPOINTS,
    ENVIRONMENT,
    LOCK,
    METRICS,
    MODEL,
    RUN_CONFIG,
    Summary,
    checkpoints_in,
    read_summary,
)

State = Literal["finished", "running", "interrupted", "adapter"]


@dataclass(frozen=True)
class Subject:
    """A run or an adapter, as its files describe it.

    folder: the run folder, or the adapter folder if there is no run; adapter: the folder of the adapter itself, or of
    the model if the run trained all weights.
    step: after which `adapter` was saved; steps: those that the training has done so far; both None without a run.
    later: the checkpoint after the last step, if the adapter is an earlier one; otherwise empty.
    metrics: the lines of metrics.jsonl; environment: the content of environment.json.
    """

    folder: Path
    adapter: Path
    state: State
    config: Config | None = None
    summary: Summary | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()
    training: Points = field(default_factory=list)
    held_out: Points = field(default_factory=list)
    step: int | None = None
    later: tuple[Path, ...] = ()

    @property
    def is_whole_model(self) -> bool:
        """Whether the run trained all weights, so that there is a model in place of an adapter."""
        return self.config is not None and self.config.training.method == "full"

    @property
    def steps(self) -> int | None:
        """The number of steps that were done, as far as is known."""
        if self.summary:
            return self.summary.steps
        return self.training[-1][0] if self.training else self.step

    @property
    def epochs(self) -> float | None:
        """The epochs that were done when the adapter was saved."""
        done = [line for line in self.metrics if "epoch" in line and self.step and line["step"] <= self.step]
        return float(done[-1]["epoch"]) if done else None

    @property
    def saw_all_rows(self) -> bool:
        """Whether the training had used every row once when the adapter was saved."""
        return (self.epochs or 0) > 0.999  # a sum of fractions


def find_subject(path: Path) -> Subject:
    """What is at `path`. Raises AdapterError or RunError if it is neither, or a run without a checkpoint."""
    path = path.parent if path.name in (ADAPTER, MODEL) and (path.parent / RUN_CONFIG).is_file() else path
    if not (path / RUN_CONFIG).is_file():
        return Subject(path, find_adapter(path), "adapter")
    config = load_config(path / RUN_CONFIG, {})
    training, held_out = read_losses(path) if (path / METRICS).is_file() else ([], [])
    metrics = tuple(read_objects(path / METRICS, RunError)) if (path / METRICS).is_file() else ()
    environment = read_object(path / ENVIRONMENT, RunError) if (path / ENVIRONMENT).is_file() else {}
    summary, checkpoints = read_summary(path), checkpoints_in(path / CHECKPOINTS)
    if config.training.method == "full":
        model = find_model(path)
        if summary is None or model is None:
            raise RunError(
                _(
                    "{run}: this run trains all weights and is not finished, so it has no model yet. Finish it with: "
                    "lorasmith train --output {run} --resume",
                    run=path,
                )
            )
        step = summary.steps if summary.best_step is None else summary.best_step
        return Subject(path, model, "finished", config, summary, environment, metrics, training, held_out, step)
    has_adapter = summary is not None and (path / ADAPTER / ADAPTER_CONFIG).is_file()
    if not has_adapter and not checkpoints:
        raise RunError(
            _(
                "{run}: this run has no adapter yet: it is not finished, and no checkpoint is saved. Report on it "
                "later, or train with --save-every to save checkpoints more often.",
                run=path,
            )
        )
    last = checkpoints[-1:]
    if summary is not None and has_adapter:
        state: State = "finished"
        step = summary.steps if summary.best_step is None else summary.best_step
        later = tuple(place for at, place in last if at > step)
    else:
        state = "running" if is_locked(path / LOCK) else "interrupted"
        (step, _place), later = last[0], ()
    if config.lora.bias != "none" or config.training.method in METHODS:
        later = ()  # both adapters would train the base model's own biases; or there are no losses to compare
    adapter = path / ADAPTER if has_adapter else last[0][1]
    return Subject(path, adapter, state, config, summary, environment, metrics, training, held_out, step, later)
