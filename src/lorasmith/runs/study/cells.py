"""Training the cells of a study, and keeping what was measured of each: STUDY/results/NAME.json."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lorasmith.config.study import Cell
from lorasmith.config.values import read_back
from lorasmith.errors import LorasmithError, RunError, TrainingError
from lorasmith.evaluation.general_text import general_examples
from lorasmith.evaluation.loss import ExampleLosses, evaluate_loss
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.runs.study.folder import RESULTS
from lorasmith.runs.train import train
from lorasmith.system.memory import reset_peak_memory
from lorasmith.system.writing import discard, remove, write_file, writing
from lorasmith.training.assemble import LoadBase
from lorasmith.training.loop import Job
from lorasmith.training.run_files import CHECKPOINTS, SUMMARY, checkpoints_in, is_run


@dataclass(frozen=True)
class Losses:
    """The losses of the same examples before and after training, as `ExampleLosses` has them."""

    weights: list[float]
    before: list[float]
    after: list[float]

    @classmethod
    def of(cls, before: ExampleLosses, after: ExampleLosses) -> "Losses":
        """From two evaluations of the same examples."""
        return cls(before.weights.tolist(), before.losses.tolist(), after.losses.tolist())

    @property
    def pair(self) -> tuple[ExampleLosses, ExampleLosses]:
        """Before and after."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        before, after = (torch.tensor(values, dtype=torch.float64) for values in (self.before, self.after))
        return ExampleLosses(before, weights), ExampleLosses(after, weights)


@dataclass(frozen=True)
class Measured:
    """What was measured of a cell: its losses, or the problems that ended its training.

    base: identity of the base model and fingerprint of the held-out examples; only cells with the same one are
    compared. held_out: None if nothing is held out. general: losses on the general text; None if not asked for.
    """

    version: int = 1
    base: str = ""
    held_out: Losses | None = None
    general: Losses | None = None
    problems: tuple[str, ...] = field(default=())


def read_measured(study: Path, name: str) -> Measured | None:
    """What was measured of the cell; None if it has not been trained. Raises RunError if the file is broken."""
    path = _path(study, name)
    if not path.is_file():
        return None
    try:
        return read_back(path, Measured)
    except (OSError, ValueError) as error:
        raise RunError(
            _(
                "{path}: not in the format that a study writes: {error}. Remove the file; the study then measures "
                "again.",
                path=path,
                error=error,
            )
        ) from None


def is_finished(study: Path, cell: Cell) -> bool:
    """Whether there is nothing left to do for the cell: it has been trained and measured, or its training diverged."""
    measured = read_measured(study, cell.name)
    return measured is not None and (bool(measured.problems) or (study / cell.name / SUMMARY).is_file())


def train_cells(
    study: Path, cells: Sequence[Cell], load: LoadBase, before: "BaseModel", report: Callable[[Cell], Report],
    done: Callable[[Cell, tuple[str, ...]], None],
) -> None:  # fmt: skip
    """Train the cells that are not finished, one after the other, each in its run folder and resumed if it was started.

    load: gives the base model, such as a `SharedBase`. before: keeps what is measured of it. report: makes the report
    of a cell. done: called with each cell and its problems. A cell that diverged is recorded as such and not tried
    again. Another problem of the first cell is raised, because all have it; one of a later cell is passed to `done`,
    and the others go on.
    """
    for number, cell in enumerate(cells):
        try:
            _train_cell(study, cell, load, before, report(cell))
        except TrainingError as error:
            _write(study, cell.name, Measured(problems=error.problems))
            done(cell, error.problems)
        except LorasmithError as error:
            if number == 0:
                raise
            done(cell, error.problems)
        else:
            done(cell, ())


def _train_cell(study: Path, cell: Cell, load: LoadBase, before: "BaseModel", report: Report) -> None:
    folder = study / cell.name
    resume = is_run(folder)
    if resume and (folder / SUMMARY).is_file():  # but not measured: the run is finished once more
        with writing(folder):
            remove(folder / SUMMARY)
    reset_peak_memory()
    train(cell.config, report, resume=resume, load=load, measure=_Measure(study, cell, before, report))
    with writing(folder):  # a finished run needs no checkpoint, and one of all weights takes gigabytes
        for _step, checkpoint in checkpoints_in(folder / CHECKPOINTS):
            discard(checkpoint)


class BaseModel:
    """What is measured of a base model: its losses on the general text and on held-out examples, each computed once."""

    def __init__(self, forget: bool) -> None:
        self.forget = forget
        self._general: dict[str, ExampleLosses] = {}
        self._held_out: dict[str, ExampleLosses] = {}

    def general(self, job: Job, report: Report) -> ExampleLosses | None:
        """Those on the general text; None if they are not asked for."""
        key = _key(job)
        if self.forget and key not in self._general:
            self._general[key] = _general_losses(job, None, report)
        return self._general.get(key)

    def held_out(self, job: Job) -> ExampleLosses | None:
        """Those on the held-out examples of `job`, if they are known."""
        return self._held_out.get(_key(job, held_out=True))

    def keep(self, job: Job, losses: ExampleLosses | None) -> None:
        """Keep those on the held-out examples of `job`, unless they are of a loss that depends on more."""
        if losses is not None and job.preference is None:
            self._held_out[_key(job, held_out=True)] = losses


def _key(job: Job, held_out: bool = False) -> str:
    """What the losses of a base model depend on."""
    base, more = job.base, list[object]()
    if held_out:  # of a run that equals one alone to the last bit, so the same kernels computed them
        more = [job.origin.settings["held_out_sha256"], sorted(base.fast_parts), job.config.method]
    return json.dumps([*base.identity.values(), str(base.dtype), base.quantize, *more])


def _general_losses(job: Job, adapter: str | None, report: Report) -> ExampleLosses:
    """On the general text, those under an adapter, or of the model without one."""
    examples = general_examples(job.base.tokenizer, job.base.max_positions)
    return evaluate_loss(job.base, examples, adapter, report, _("loss on the general text"))


@dataclass
class _Measure:
    """Measures a cell; see `runs.train.Measure`."""

    study: Path
    cell: Cell
    base: BaseModel
    report: Report
    before: ExampleLosses | None = None  # on the general text

    def started(self, job: Job) -> None:
        self.before = self.base.general(job, self.report)

    def known(self, job: Job) -> ExampleLosses | None:
        return self.base.held_out(job)

    def finished(self, job: Job, before: ExampleLosses | None, after: ExampleLosses | None) -> None:
        """Write what was measured. Raises TrainingError if the held-out loss is not finite."""
        folder = self.study / self.cell.name
        if after is not None and not bool(after.losses.isfinite().all()):
            raise TrainingError(_("{run}: the held-out loss is not finite; the training diverged.", run=folder))
        self.base.keep(job, before)
        held_out = Losses.of(before, after) if before and after else None
        identity = {**job.base.identity, "held_out": job.origin.settings["held_out_sha256"]}
        general = None
        if self.before:
            general = Losses.of(self.before, _general_losses(job, job.adapter, self.report))
        measured = Measured(base=json.dumps(identity, sort_keys=True), held_out=held_out, general=general)
        _write(self.study, self.cell.name, measured)


def _write(study: Path, name: str, measured: Measured) -> None:
    path = _path(study, name)
    with writing(path, is_run=False):
        path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps(asdict(measured)) + "\n", is_run=False)


def _path(study: Path, name: str) -> Path:
    return study / RESULTS / f"{name}.json"
