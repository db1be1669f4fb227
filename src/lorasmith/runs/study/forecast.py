"""How long the runs of a study will take, measured in a few steps of one run of each kind."""

import json
from dataclasses import dataclass

from lorasmith.config.study import SEED, Cell, Study
from lorasmith.i18n import _
from lorasmith.loading.shared import SharedBase
from lorasmith.preflight.check import CheckResult, check
from lorasmith.preflight.measurements import IRRELEVANT_OPTIONS
from lorasmith.report import Report
from lorasmith.runs.study.cells import is_finished
from lorasmith.runs.study.repeats import runs_of


@dataclass(frozen=True)
class Expected:
    """A cell with the seconds that it will take; None if they cannot be told. problems: why it cannot be trained."""

    cell: Cell
    seconds: float | None
    is_finished: bool
    problems: tuple[str, ...] = ()


def forecast(study: Study, report: Report | None = None) -> list[Expected]:
    """What each known cell will take. One cell of each kind is loaded and tried; those of a kind take the same time.

    Cells are of one kind if they differ only in options that change neither time nor memory, such as the learning rate.
    """
    report, load = report or Report(), SharedBase()
    found = dict[str, CheckResult]()
    cells = runs_of(study).cells
    kinds = {cell.name: _kind(cell) for cell in cells}
    for number, cell in enumerate(cells, 1):
        if kinds[cell.name] not in found:
            config = cell.config.model_copy(update={"output": None})
            found[kinds[cell.name]] = check(config, report, load)
        report.progress(_("trying runs"), number, len(cells))
    return [_expected(study, cell, found[kinds[cell.name]]) for cell in cells]


def _expected(study: Study, cell: Cell, found: CheckResult) -> Expected:
    seconds = sum(found.facts.expected.seconds.values()) if found.facts else None
    return Expected(cell, seconds, is_finished(study.folder, cell), tuple(found.problems))


def _kind(cell: Cell) -> str:
    options = cell.config.model_dump(mode="json", exclude={"output"})
    options["training"] = {
        key: value for key, value in options["training"].items() if key not in IRRELEVANT_OPTIONS | {_SEED}
    }
    return json.dumps(options, sort_keys=True)


_SEED = SEED.rpartition(".")[2]
