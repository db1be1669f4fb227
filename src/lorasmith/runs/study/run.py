"""A whole study: settle its cells, train those that are open, and write the results after each."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lorasmith.config.study import Cell, Study
from lorasmith.errors import Interrupted
from lorasmith.i18n import _
from lorasmith.loading.shared import SharedBase
from lorasmith.report import Report
from lorasmith.runs.study.cells import is_finished, read_measured, train_cells
from lorasmith.runs.study.folder import RESULT, settle, study_lock
from lorasmith.runs.study.parallel import processes_for, train_in_parallel
from lorasmith.runs.study.result import StudyResult, collect
from lorasmith.system.writing import write_file
from lorasmith.training.run_files import read_summary

Show = Callable[[StudyResult], None]


def run_study(study: Study, report: Report | None = None, show: Show | None = None, parallel: int = 1) -> StudyResult:
    """Train the cells that have not been trained yet, and return the results of all.

    show: called with the results so far after each cell, and at the end. parallel: the number of cells to train at
    once, each in a process of its own, where cores and memory allow it.

    Raises:
        RunError: the folder belongs to something else, or the file of the study has changed.
        Interrupted: the user pressed Ctrl-C; what was done is kept.
        LorasmithError: a problem of the first cell, which most likely is one of all.
    """
    report = report or Report()
    with study_lock(study.folder, report):
        study = settle(study, report)
        waiting = [cell for cell in study.cells if not is_finished(study.folder, cell)]
        _say_what_is_done(study, waiting, report)
        processes = processes_for(study, min(parallel, len(waiting) or 1), report)
        progress = _Progress(study, report, waiting)

        def done(cell: Cell, problems: tuple[str, ...]) -> None:
            progress.done(cell, problems)
            _write(study, show)

        try:
            if processes > 1:
                train_in_parallel(study, waiting, processes, done)
            else:
                train_cells(study.folder, waiting, SharedBase(), study.forget, progress.of, done)
        except KeyboardInterrupt:
            left = sum(not is_finished(study.folder, cell) for cell in study.cells)
            raise Interrupted(
                _(
                    "Interrupted. {done} of {all} runs are finished and kept in {folder}; the same command continues.",
                    done=len(study.cells) - left,
                    all=len(study.cells),
                    folder=study.folder,
                )
            ) from None
        return _write(study, show)


def _write(study: Study, show: Show | None) -> StudyResult:
    result = collect(study)
    write_file(study.folder / RESULT, json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n", is_run=False)
    if show:
        show(result)
    return result


def _say_what_is_done(study: Study, waiting: list[Cell], report: Report) -> None:
    known = len(study.cells) - len(waiting)
    if known:
        report.say(
            _(
                "{folder}: {known} of {all} runs are finished and kept.",
                folder=study.folder,
                known=known,
                all=len(study.cells),
            )
        )
    failed = [cell.name for cell in study.cells if (found := read_measured(study.folder, cell.name)) and found.problems]
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
    waiting: list[Cell]
    started: float = 0.0  # of the current cell
    took: list[float] = field(default_factory=list)  # seconds of each finished cell

    def of(self, cell: Cell) -> Report:
        """The report of a cell."""
        self.started = time.perf_counter()
        return _CellReport(self, cell)

    def done(self, cell: Cell, problems: tuple[str, ...]) -> None:
        """Report the result of a cell."""
        self.took.append(time.perf_counter() - self.started)
        if problems:
            self.report.warn(_("{name} failed: {problem}", name=self.title(cell), problem=problems[0]))
            return
        summary = read_summary(self.study.folder / cell.name)
        self.report.say(f"{self.title(cell)}: {summary}")

    def title(self, cell: Cell) -> str:
        """'[3/12] r8_lr0.0003'."""
        return f"[{self.study.cells.index(cell) + 1}/{len(self.study.cells)}] {cell.name}"

    def seconds_left(self, of_cell: float) -> float:
        """The seconds left for the study, if the current cell needs `of_cell` more."""
        this = time.perf_counter() - self.started + of_cell
        after = len(self.waiting) - len(self.took) - 1
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
