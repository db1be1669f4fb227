"""How long the runs of a study will take, measured in a few steps of one run of each kind."""

import json
from dataclasses import dataclass

from lorasmith.config.study import SEED, Cell, Study
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.loading.shared import SharedBase
from lorasmith.preflight.check import check
from lorasmith.preflight.measurements import IRRELEVANT_OPTIONS
from lorasmith.report import Report
from lorasmith.runs.study.cells import is_finished


@dataclass(frozen=True)
class Expected:
    """A cell with the seconds that it will take; None if they cannot be told."""

    cell: Cell
    seconds: float | None
    is_finished: bool


def forecast(study: Study, report: Report | None = None) -> list[Expected]:
    """What each cell will take. One cell of each kind is loaded and tried; those of a kind take the same time.

    Cells are of one kind if they differ only in options that change neither time nor memory, such as the learning rate.

    Raises ConfigError with the problems of the cells that were tried.
    """
    report, load = report or Report(), SharedBase()
    seconds, problems = dict[str, float | None](), dict[str, None]()
    kinds = {cell.name: _kind(cell) for cell in study.cells}
    for number, cell in enumerate(study.cells, 1):
        if kinds[cell.name] not in seconds:
            config = cell.config.model_copy(update={"output": None})
            found = check(config, report, load)
            problems |= dict.fromkeys(f"{cell.name}: {text}" for text in found.problems)
            seconds[kinds[cell.name]] = sum(found.facts.expected.seconds.values()) if found.facts else None
        report.progress(_("trying runs"), number, len(study.cells))
    if problems:
        raise ConfigError(*problems)
    return [Expected(cell, seconds[kinds[cell.name]], is_finished(study.folder, cell)) for cell in study.cells]


def _kind(cell: Cell) -> str:
    options = cell.config.model_dump(mode="json", exclude={"output"})
    options["training"] = {
        key: value for key, value in options["training"].items() if key not in IRRELEVANT_OPTIONS | {_SEED}
    }
    return json.dumps(options, sort_keys=True)


_SEED = SEED.rpartition(".")[2]
