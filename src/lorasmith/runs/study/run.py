"""A whole study: settle its cells, train those that are open, and write the results after each."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lorasmith.config.study import Cell, Study
from lorasmith.errors import ConfigError, Interrupted
from lorasmith.i18n import _
from lorasmith.loading.shared import SharedBase
from lorasmith.report import Report
from lorasmith.runs.study.cells import BaseModel, is_finished, read_measured, train_cells
from lorasmith.runs.study.folder import RESULT, settle, study_lock
from lorasmith.runs.study.parallel import processes_for, train_in_parallel
from lorasmith.runs.study.repeats import runs_of
from lorasmith.runs.study.result import StudyResult, collect
from lorasmith.system.writing import write_file
from lorasmith.training.run_files import read_summary

Show = Callable[[StudyResult], None]


def run_study(
    study: Study, report: Report | None = None, show: Show | None = None, parallel: int = 1, at_once: int = 1
) -> StudyResult:
    """Train the cells that have not been trained yet, and return the results of all.

    show: called with the results so far after each cell, and at the end. parallel: the number of cells to train at
    once, each in a process of its own, where cores and memory allow it. at_once: the most adapters to train in the same
    steps of one process; each is the same as alone up to rounding.

    Raises:
        ConfigError: both `parallel` and `at_once` are asked for.
        RunError: the folder belongs to something else, or the file of the study has changed.
        Interrupted: the user pressed Ctrl-C; what was done is kept.
        LorasmithError: a problem of the first cell, which most likely is one of all.
    """
    report = report or Report()
    if parallel > 1 and at_once > 1:
        raise ConfigError(_("--parallel and --at-once cannot be combined. Choose one of them."))
    with study_lock(study.folder, report):
        study = settle(study, report)
        _say_what_is_done(study, report)
        progress = _Progress(study, report)
        load, before = SharedBase(), BaseModel(study.forget)

        def done(cell: Cell, problems: tuple[str, ...]) -> None:
            progress.done(cell, problems)
            _write(study, show)

        try:
            tried = set[str]()
            while waiting := [cell for cell in _waiting(study) if cell.name not in tried]:
                tried |= {cell.name for cell in waiting}
                processes = processes_for(study, min(parallel, len(waiting)), report)
                if processes > 1:
                    train_in_parallel(study, waiting, processes, done)
                else:
                    train_cells(study.folder, waiting, load, before, progress.of, done, at_once)
        except KeyboardInterrupt:
            runs = runs_of(study)
            raise Interrupted(
                _(
                    "Interrupted. {done} of {all} runs are finished and kept in {folder}; the same command continues.",
                    done=len(runs.cells) - len(_waiting(study)),
                    all=runs.total,
                    folder=study.folder,
                )
            ) from None
        return _write(study, show)


def _waiting(study: Study) -> list[Cell]:
    """The runs that are known and not finished."""
    return [cell for cell in runs_of(study).cells if not is_finished(study.folder, cell)]


def _write(study: Study, show: Show | None) -> StudyResult:
    result = collect(study)
    write_file(study.folder / RESULT, json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n", is_run=False)
    if show:
        show(result)
    return result


def _say_what_is_done(study: Study, report: Report) -> None:
    runs = runs_of(study)
    known = len(runs.cells) - len(_waiting(study))
    if known:
        report.say(
            _(
                "{folder}: {known} of {all} runs are finished and kept.",
                folder=study.folder,
                known=known,
                all=runs.total,
            )
        )
    failed = [cell.name for cell in runs.cells if (found := read_measured(study.folder, cell.name)) and found.problems]
    for name in failed:
        report.warn(
            _(
                "{name}: failed before and is not tried again. To try it again, remove {folder}/results/{name}.json",
                name=name,
                folder=study.folder,
            )
        )


@dataclass
class _Progress:
    """The progress of the whole study, as the progress of the cell that is trained."""

    study: Study
    report: Report
    started: float = 0.0  # of the current cell
    took: list[float] = field(default_factory=list)  # seconds of each finished cell

    def of(self, cell: Cell) -> Report:
        """The report of a cell."""
        self.started = time.perf_counter()
        return _CellReport(self, cell)

    def done(self, cell: Cell, problems: tuple[str, ...]) -> None:
        """Report the result of a cell."""
        now = time.perf_counter()
        self.took.append(now - self.started)
        self.started = now  # of those that were trained in the same steps, the first has taken the time of all
        if problems:
            self.report.warn(_("{name} failed: {problem}", name=self.title(cell), problem=problems[0]))
            return
        summary = read_summary(self.study.folder / cell.name)
        self.report.say(f"{self.title(cell)}: {summary}")

    def title(self, cell: Cell) -> str:
        """'[3/12] r8_lr0.0003'."""
        runs = runs_of(self.study)
        return f"[{runs.cells.index(cell) + 1}/{runs.total}] {cell.name}"

    def seconds_left(self, of_cell: float) -> float:
        """The seconds left for the study, if the current cell needs `of_cell` more."""
        this = time.perf_counter() - self.started + of_cell
        runs = runs_of(self.study)
        after = runs.total - len(runs.cells) + len(_waiting(self.study)) - 1
        typical = sum(self.took) / len(self.took) if self.took else this
        return of_cell + after * typical


class _CellReport(Report):
    """Shows the training of a cell as progress of the study, and its warnings under its name."""

    def __init__(self, progress: _Progress, cell: Cell) -> None:
        self.progress_of_study, self.title = progress, progress.title(cell)

    def warn(self, text: str) -> None:
        self.progress_of_study.report.warn(f"{self.title}: {text}")

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        if task != _("training"):
            return
        left = self.progress_of_study.seconds_left(numbers.get("seconds_left", 0.0))
        self.progress_of_study.report.progress(self.title, done, total, **numbers | {"seconds_left": left})
