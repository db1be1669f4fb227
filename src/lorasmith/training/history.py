"""What a training writes down as it goes: one line of metrics.jsonl a step or evaluation, and TensorBoard's events.

RUN/metrics.jsonl    {"step": 4, "loss": 2.1, ...} after a step, {"step": 4, "held_out_loss": 2.3} of an evaluation
RUN/samples.jsonl    {"step": 4, "prompt": ..., "answer": ...}, where training.samples names prompts
RUN/tensorboard/     the numbers of metrics.jsonl, where training.tensorboard asks for them
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasmith.config.files import read_objects
from lorasmith.errors import MissingExtraError, RunError
from lorasmith.i18n import _, foreign
from lorasmith.system.writing import sync, write_file, writing
from lorasmith.training.files import EVENTS, METRICS, SAMPLES

Points = list[tuple[int, float]]


def require_tensorboard() -> None:
    """Raise MissingExtraError where the package that writes event files is not installed."""
    if find_spec("tensorboard") is None:
        raise MissingExtraError(
            _(
                "training.tensorboard: the tensorboard package is not installed. Install it with pip install "
                "'lorasmith[tensorboard]', or turn this option off: metrics.jsonl in the run folder has the "
                "same values."
            )
        )


class History:
    """The three of one run folder. Raises RunError where the disk refuses."""

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.folder, self.tensorboard = folder, tensorboard
        self._events: Any = None  # SummaryWriter, which has no annotations
        self._void_from: int | None = None  # events from this step on are of a run that died

    def append(self, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, which a killed process leaves there; an event for each number."""
        self._line(METRICS, values)
        if self.tensorboard:
            self._event(values)

    def append_sample(self, step: int, prompt: str, answer: str) -> None:
        """One line of samples.jsonl."""
        self._line(SAMPLES, {"step": step, "prompt": prompt, "answer": answer})

    def rewind(self, step: int) -> None:
        """Take out what a run resumed after `step` writes again: later lines, and the evaluation before its next step.

        Later events are marked as void when the first new one is written.
        """
        self._void_from = step + 1
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if path.is_file():
                kept = [values for values in read_objects(path, RunError) if _was_done(values, step)]
                write_file(path, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in kept))

    def sync(self) -> None:
        """What was written outlasts a loss of power too."""
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if path.is_file():
                with writing(path):
                    sync(path)

    def close(self) -> None:
        """What was written is whole."""
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

                self._events = SummaryWriter(str(self.folder / EVENTS), purge_step=self._void_from)
            for name, value in values.items():
                if name != "step":
                    self._events.add_scalar(name, value, step)
            self._events.flush()


def read_losses(run: Path) -> tuple[Points, Points]:
    """(step, loss) of training and (step, held-out loss) of a run's metrics.jsonl, also while it is being written.

    Raises RunError where there is no such file, or something else in it.
    """
    path = run / METRICS
    if not path.is_file():
        why = foreign("No such file or directory")
        raise RunError(_("{path}: cannot be read: {why}. Give a run folder.", path=path, why=why))
    try:
        lines = read_objects(path, RunError)
        training = [(int(line["step"]), float(line["loss"])) for line in lines if "loss" in line]
        measured = [(int(line["step"]), float(line["held_out_loss"])) for line in lines if "held_out_loss" in line]
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise RunError(_("{path}: not a valid metrics file: {error}", path=path, error=error)) from None
    return training, measured


def _was_done(values: Mapping[str, Any], step: int) -> bool:
    return bool(values["step"] < step or (values["step"] == step and "loss" in values))
