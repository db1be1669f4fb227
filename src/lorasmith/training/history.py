"""The history of a run, written while it trains.

RUN/metrics.jsonl    {"step": 4, "loss": 2.1, ...} for a step, {"step": 4, "held_out_loss": 2.3} for an evaluation
RUN/samples.jsonl    {"step": 4, "prompt": ..., "answer": ...} for each prompt of training.samples
RUN/tensorboard/     the numbers of metrics.jsonl as event files, if training.report_to has tensorboard
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lorasmith.config.files import read_objects
from lorasmith.errors import RunError
from lorasmith.i18n import _, foreign
from lorasmith.report import Report
from lorasmith.system.writing import sync, write_file, writing
from lorasmith.training.run_files import EVENTS, METRICS, SAMPLES
from lorasmith.training.trackers import Trackers

Points = list[tuple[int, float]]  # (step, loss)


class History:
    """Writes the history of the run in `folder`. Its methods raise RunError if a file cannot be written."""

    def __init__(self, folder: Path, names: Sequence[str] = (), report: Report | None = None) -> None:
        """`names`: the trackers that also get the numbers."""
        self.folder, self.tensorboard = folder, "tensorboard" in names
        self.trackers = Trackers(names, report or Report())
        self._events: Any = None  # a SummaryWriter, which has no annotations
        self._purge_from: int | None = None  # the first step whose events an interrupted run may have written already

    def append(self, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, and tell the trackers. The line survives if the process is killed."""
        self._line(METRICS, values)
        self.trackers.log({name: value for name, value in values.items() if name != "step"}, int(values["step"]))
        if self.tensorboard:
            self._event(values)

    def append_sample(self, step: int, prompt: str, answer: str) -> None:
        """Append a line to samples.jsonl."""
        self._line(SAMPLES, {"step": step, "prompt": prompt, "answer": answer})

    def rewind(self, step: int) -> None:
        """Remove what a run that resumes after `step` will write again: later lines, and the evaluation at `step`.

        Later events are marked as obsolete when the first new one is written.
        """
        self._purge_from = step + 1
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if path.is_file():
                kept = [values for values in read_objects(path, RunError) if _was_done(values, step)]
                write_file(path, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in kept))

    def sync(self) -> None:
        """Flush the files to disk, so that they survive a power failure."""
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if path.is_file():
                with writing(path):
                    sync(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_where: object) -> None:
        """Close the event file, and end the run in the trackers: as failed after an error or Ctrl-C."""
        self.trackers.close(failed=kind is not None)
        if self._events is not None:
            self._events.close()
            self._events = None

    def _line(self, name: str, values: Mapping[str, object]) -> None:
        path = self.folder / name
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def _event(self, values: Mapping[str, float]) -> None:
        step = int(values["step"])
        with writing(self.folder / EVENTS):
            if self._events is None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(self.folder / EVENTS), purge_step=self._purge_from)
            for name, value in values.items():
                if name != "step":
                    self._events.add_scalar(name, value, step)
            self._events.flush()


def read_losses(run: Path) -> tuple[Points, Points]:
    """The training losses and the held-out losses in a run's metrics.jsonl, which may still be growing.

    Raises RunError if there is no such file or it has other content.
    """
    path = run / METRICS
    if not path.is_file():
        why = foreign("No such file or directory")
        raise RunError(_("{path}: cannot be read: {why}. Give a run folder.", path=path, why=why))
    try:
        lines = read_objects(path, RunError)
        training = [(int(line["step"]), float(line["loss"])) for line in lines if "loss" in line]
        held_out = [(int(line["step"]), float(line["held_out_loss"])) for line in lines if "held_out_loss" in line]
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise RunError(_("{path}: not a valid metrics file: {error}", path=path, error=error)) from None
    return training, held_out


def _was_done(values: Mapping[str, Any], step: int) -> bool:
    """Whether a run that resumes after `step` does not write this line again."""
    at = values.get("step")
    return not isinstance(at, int) or at < step or (at == step and "loss" in values)


def read_scores(run: Path, step: int | None) -> dict[str, tuple[float, float]]:
    """For each metric of generated answers, its scores before training and after `step` steps (None: the last).

    Raises RunError if metrics.jsonl cannot be read.
    """
    lines = [line for line in read_objects(run / METRICS, RunError) if "held_out_loss" in line]
    if not lines:
        return {}
    last = next((line for line in lines if line["step"] == step), lines[-1])
    names = [name for name in last if name not in ("step", "held_out_loss")]
    return {name: (float(lines[0][name]), float(last[name])) for name in names if name in lines[0]}
