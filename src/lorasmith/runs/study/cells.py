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
from lorasmith.evaluation.metrics import compare_metric
from lorasmith.i18n import _
from lorasmith.report import Report
from lorasmith.runs.study.folder import RESULTS
from lorasmith.runs.together import Group, Named
from lorasmith.runs.train import train
from lorasmith.system.memory import reset_peak_memory
from lorasmith.system.writing import discard, remove, write_file, writing
from lorasmith.training.assemble import LoadBase
from lorasmith.training.at_once import why_alone
from lorasmith.training.distributed import join
from lorasmith.training.loop import Job
from lorasmith.training.run_files import CHECKPOINTS, SUMMARY, Summary, checkpoints_in, is_run


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
    scores: by step and metric, the 95% confidence interval of the difference of the scores of generated answers.
    at_once: how many adapters were trained in the same steps, whose time and memory are those of all.
    """

    version: int = 1
    base: str = ""
    held_out: Losses | None = None
    general: Losses | None = None
    scores: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    at_once: int = 1
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
    done: Callable[[Cell, tuple[str, ...]], None], at_once: int = 1,
) -> None:  # fmt: skip
    """Train the cells that are not finished, one after the other, each in its run folder and resumed if it was started.

    load: gives the base model, such as a `SharedBase`. before: keeps what is measured of it. report: makes the report
    of a cell. done: called with each cell and its problems. at_once: the most adapters to train in the same steps,
    where that is possible. A cell that diverged is recorded as such and not tried again. Another problem of the first
    cell is raised, because all have it; one of a later cell is passed to `done`, and the others go on.
    """
    for group in grouped(cells, at_once):
        together = _train_at_once(study, group, load, before, report(group[0])) if len(group) > 1 else {}
        for cell in group:
            try:
                if cell.name not in together:
                    _train_alone(study, cell, load, before, report(cell))
                elif isinstance(error := together[cell.name], LorasmithError):
                    raise error
            except TrainingError as error:
                _write(study, cell.name, Measured(problems=error.problems))
                done(cell, error.problems)
            except LorasmithError as error:
                if cell is cells[0]:
                    raise
                done(cell, error.problems)
            else:
                done(cell, ())


def grouped(cells: Sequence[Cell], at_once: int) -> list[list[Cell]]:
    """The cells in order, in groups of at most `at_once` that can share a base model and its passes."""
    groups = list[list[Cell]]()
    for cell in cells:
        last = groups[-1] if groups else []
        fits = 0 < len(last) < at_once and last[0].config.model == cell.config.model
        if fits and not any(why_alone(one.config, join()) or one.config.lora.lora_dropout for one in (last[0], cell)):
            last.append(cell)
        else:
            groups.append([cell])
    return groups


def _train_alone(study: Path, cell: Cell, load: LoadBase, before: "BaseModel", report: Report) -> None:
    resume = _prepare(study, cell)
    reset_peak_memory()
    train(cell.config, report, resume=resume, load=load, measure=_Measure(study, cell, before, report))
    _drop_checkpoints(study, cell)


def _train_at_once(
    study: Path, cells: Sequence[Cell], load: LoadBase, before: "BaseModel", report: Report
) -> dict[str, Summary | LorasmithError]:
    """The results of the cells by name, trained in the same steps; empty if they cannot be trained like this."""
    for cell in cells:
        _prepare(study, cell)
    reports = [report, *(Quiet(cell.name, report) for cell in cells[1:])]
    measures = [_Measure(study, cell, before, report, len(cells)) for cell in cells]
    try:
        found = Group([cell.config for cell in cells], reports, report, load, measures).train(True, False)
    except LorasmithError as error:
        report.warn(_("these runs are trained one after the other: {error}", error=error))
        return {}
    for cell in cells:
        _drop_checkpoints(study, cell)
    return dict(zip((cell.name for cell in cells), found, strict=True))


class Quiet(Named):
    """The report of a run beside another one, whose progress is shown."""

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """Show nothing."""


def _prepare(study: Path, cell: Cell) -> bool:
    """Whether the cell was started before. One that is finished but not measured is to be finished once more."""
    folder = study / cell.name
    if is_run(folder) and (folder / SUMMARY).is_file():
        with writing(folder):
            remove(folder / SUMMARY)
    return is_run(folder)


def _drop_checkpoints(study: Path, cell: Cell) -> None:
    """A finished run needs no checkpoint, and one of all weights takes gigabytes."""
    folder = study / cell.name
    with writing(folder):
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
    at_once: int = 1
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
        base, scores = json.dumps(identity, sort_keys=True), _score_intervals(job)
        measured = Measured(base=base, held_out=held_out, general=general, scores=scores, at_once=self.at_once)
        _write(self.study, self.cell.name, measured)


def _score_intervals(job: Job) -> dict[str, dict[str, tuple[float, float]]]:
    """By step and metric, the interval of the difference to the base model; empty if its answers are not known.

    They are not if the run was resumed.
    """
    answered, generation = job.evaluator.answered, job.evaluator.generation
    if generation is None or 0 not in answered:
        return {}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for step in answered.keys() - {0}:
        pairs = zip(generation.metrics, answered[0], answered[step], strict=True)
        compared = [compare_metric(metric, before, after, job.config.seed) for metric, before, after in pairs]
        found[str(step)] = {Path(one.key).name: (one.low, one.high) for one in compared}
    return found


def _write(study: Path, name: str, measured: Measured) -> None:
    path = _path(study, name)
    with writing(path, is_run=False):
        path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps(asdict(measured)) + "\n", is_run=False)


def _path(study: Path, name: str) -> Path:
    return study / RESULTS / f"{name}.json"
