"""Which runs of a study to train: all, or with `repeat = "best"` those of the first seed, then repeats of the best."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.config.study import RATE, SEED, Cell, Study
from lorasmith.runs.study.cells import is_finished, read_measured


@dataclass(frozen=True)
class Runs:
    """The runs of a study as far as they are known. total: how many there will be, once all results are known."""

    cells: tuple[Cell, ...]
    total: int


def runs_of(study: Study) -> Runs:
    """The runs to train. Those that depend on results are known once the runs of the first seed have finished.

    Raises RunError if a result cannot be read.
    """
    if study.repeat == "all":
        return Runs(study.cells, len(study.cells))
    curves: dict[str, list[Cell]] = {}
    for cell in study.cells:
        rest = {key: value for key, value in cell.options.items() if key not in (RATE, SEED)}
        curves.setdefault(json.dumps(rest, sort_keys=True), []).append(cell)
    found = [_repeated(study, cells) for cells in curves.values()]
    firsts = [cell for first, _repeats, _count in found for cell in first]
    repeats = [cell for _first, chosen, _count in found for cell in chosen]
    return Runs((*firsts, *repeats), len(firsts) + sum(count for _first, _repeats, count in found))


def _repeated(study: Study, cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell], int]:
    """The runs of the first seed, the repeats of the best of them, if it is known, and how many of these there are."""
    seed = cells[0].config.training.seed
    first = [cell for cell in cells if cell.config.training.seed == seed]
    count = len({cell.config.training.seed for cell in cells}) - 1
    if not all(is_finished(study.folder, cell) for cell in first):
        return first, [], count
    losses = [_loss(study, cell) for cell in first]
    best = first[losses.index(min(losses))].config.training.learning_rate
    if not math.isfinite(min(losses)):
        return first, [], 0
    others = [cell for cell in cells if cell not in first]
    return first, [cell for cell in others if cell.config.training.learning_rate == best], count


def _loss(study: Study, cell: Cell) -> float:
    """The held-out loss of a finished run; infinity if it failed."""
    measured = read_measured(study.folder, cell.name)
    return measured.held_out.pair[1].loss if measured and measured.held_out else math.inf
