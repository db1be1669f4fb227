"""The results of a study: each cell, each setting over its seeds, and which differences are larger than the noise."""

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from lorasmith.config.study import RATE, SEED, Cell, Study, setting_text, value_text
from lorasmith.evaluation.loss import Comparison, compare
from lorasmith.evaluation.seeds import SeedComparison, compare_over_seeds
from lorasmith.runs.study.cells import Measured, read_measured
from lorasmith.runs.study.repeats import runs_of
from lorasmith.training.history import read_scores
from lorasmith.training.run_files import Summary, read_summary
from lorasmith.version import installed_version

FORMAT = 1
Options = dict[str, Any]
State = Literal["finished", "failed", "open"]


@dataclass(frozen=True)
class CellResult:
    """One run. Losses in nats per token; `loss` against the base model, `general` on the general text.

    seconds: of its training steps; like the memory, None if it was trained at once with others. scores: of generated
    answers, by metric: those of the base model and of the run. score_intervals: 95% confidence intervals of their
    differences, where they are known. problems: why it failed.
    """

    name: str
    options: Options
    seed: int
    state: State
    loss: Comparison | None = None
    general: Comparison | None = None
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_mib: float | None = None
    trainable_parameters: int | None = None
    problems: tuple[str, ...] = ()
    score_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """The cells that differ only in their seed.

    options: those of the grid without the seed. from_best: compared with the best setting; None for that one itself, or
    if they have no seed in common or different held-out examples.
    """

    options: Options
    cells: tuple[CellResult, ...]
    from_best: SeedComparison | None = None

    @property
    def name(self) -> str:
        """Its options in words."""
        return setting_text(self.options)

    @property
    def losses(self) -> list[float]:
        """The held-out loss of each seed that has one."""
        return [cell.loss.after for cell in self.cells if cell.loss]

    @property
    def failed(self) -> int:
        """The number of seeds whose training failed."""
        return sum(cell.state == "failed" for cell in self.cells)

    @property
    def mean(self) -> float:
        """The mean held-out loss over seeds; infinity if a seed failed or none has a loss."""
        return statistics.mean(self.losses) if self.losses and not self.failed else math.inf

    @property
    def median(self) -> float:
        """The median held-out loss over seeds, failed ones as infinity."""
        values = self.losses + [math.inf] * self.failed
        return statistics.median(values) if values else math.inf

    @property
    def forgetting(self) -> float | None:
        """How much the loss on the general text rose, as the mean over seeds."""
        found = [cell.general.difference for cell in self.cells if cell.general]
        return statistics.mean(found) if found else None

    def mean_of(self, name: str) -> float | None:
        """The mean over seeds of a figure, such as 'seconds'."""
        found = [value for cell in self.cells if (value := getattr(cell, name)) is not None]
        return statistics.mean(found) if found else None


@dataclass(frozen=True)
class Curve:
    """Settings that differ only in the option on the horizontal axis, in its order.

    repeat: as in the study's file. With 'best', the setting that was trained with more seeds is the best one.
    """

    options: Options
    settings: tuple[Setting, ...]
    repeat: str = "all"

    @property
    def name(self) -> str:
        """Its options in words."""
        return setting_text(self.options)

    @property
    def is_open(self) -> bool:
        """Whether none of its runs has been trained."""
        return not any(setting.losses or setting.failed for setting in self.settings)

    @property
    def best(self) -> Setting:
        """The setting with the lowest mean loss."""
        return min(_comparable(self.settings, self.repeat), key=lambda setting: setting.mean)


@dataclass(frozen=True)
class StudyResult:
    """All results. axis: the option that curves have on their horizontal axis. machine: where it was computed."""

    study: str
    base: str
    data: tuple[str, ...]
    examples: int
    axis: str
    cells: tuple[CellResult, ...]
    settings: tuple[Setting, ...]
    machine: dict[str, str]
    repeat: str = "all"

    @property
    def best(self) -> Setting | None:
        """The setting with the lowest mean held-out loss of those of which all seeds have finished."""
        done = [one for one in self.settings if math.isfinite(one.mean) and all(c.loss for c in one.cells)]
        return min(_comparable(done, self.repeat), key=lambda setting: setting.mean, default=None)

    @cached_property
    def curves(self) -> list[Curve]:
        """The settings by their options other than that of the axis."""
        groups: dict[str, list[Setting]] = {}
        for setting in self.settings:
            rest = {key: value for key, value in setting.options.items() if key != self.axis}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(setting)
        return [
            Curve(
                {key: value for key, value in group[0].options.items() if key != self.axis},
                tuple(sorted(group, key=lambda setting: _order(setting.options.get(self.axis)))),
                self.repeat,
            )
            for group in groups.values()
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values for study.json. Infinite numbers do not occur: failed cells have no loss."""
        settings = [
            {
                "options": setting.options,
                "cells": [cell.name for cell in setting.cells],
                "losses": setting.losses,
                "failed": setting.failed,
                "forgetting": setting.forgetting,
                "from_best": setting.from_best and asdict(setting.from_best),
            }
            for setting in self.settings
        ]
        whole = {"study": self.study, "base": self.base, "data": self.data, "examples": self.examples}
        cells = [asdict(cell) for cell in self.cells]
        return {
            "version": FORMAT,
            **whole,
            "axis": self.axis,
            "repeat": self.repeat,
            "machine": self.machine,
            "settings": settings,
            "cells": cells,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StudyResult":
        """The result that a study.json holds. Raises ValueError if it is something else."""
        if values.get("version") != FORMAT:
            raise ValueError(f"version {values.get('version')!r}")
        cells = TypeAdapter(tuple[CellResult, ...]).validate_python(values["cells"])
        compared = [TypeAdapter(SeedComparison | None).validate_python(one["from_best"]) for one in values["settings"]]
        settings = zip(_settings(cells), compared, strict=True)
        return cls(
            **{key: values[key] for key in ("study", "base", "examples", "axis", "machine")},
            data=tuple(values["data"]),
            repeat=values.get("repeat", "all"),
            cells=cells,
            settings=tuple(replace(setting, from_best=found) for setting, found in settings),
        )


def collect(study: Study) -> StudyResult:
    """Read the results of a study from its folder; cells that have not been trained are open. Raises RunError."""
    seed = study.cells[0].config.training.seed
    runs = runs_of(study).cells
    measured = {cell.name: read_measured(study.folder, cell.name) for cell in runs}
    cells = tuple(_cell_result(study, cell, measured[cell.name], seed) for cell in runs)
    first = next((found for found in measured.values() if found and found.held_out), None)
    examples = len(first.held_out.weights) if first and first.held_out else 0
    config = study.cells[0].config
    data = tuple(Path(file).name for file in config.data.data)
    axis = _axis(cells, study.keys)
    name, about = study.folder.name, machine()
    return combined(name, config.model.model, data, examples, axis, cells, measured, about, seed, study.repeat)


def combined(
    study: str, base: str, data: tuple[str, ...], examples: int, axis: str, cells: Sequence[CellResult],
    measured: Mapping[str, Measured | None], machine: dict[str, str], seed: int = 0, repeat: str = "all",
) -> StudyResult:  # fmt: skip
    """The result of a study with these cells: its settings, each compared with the best one by `measured`."""
    settings = tuple(_settings(cells))
    result = StudyResult(study, base, data, examples, axis, tuple(cells), settings, machine, repeat)
    best = result.best
    if best is None:
        return result
    compared = (Setting(one.options, one.cells, _from_best(best, one, measured, seed)) for one in settings)
    return replace(result, settings=tuple(compared))


def machine() -> dict[str, str]:
    """The processor, its number of cores and the versions."""
    import torch

    names = {"model name", "Model", "Hardware"}
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in names)
    processor = next(found, platform.processor() or platform.machine())
    versions = {"lorasmith": installed_version() or "", "torch": torch.__version__, "python": platform.python_version()}
    return {"processor": processor, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()), **versions}


def _cell_result(study: Study, cell: Cell, measured: Measured | None, seed: int) -> CellResult:
    folder, run_seed = study.folder / cell.name, cell.config.training.seed
    if measured is None or (summary := read_summary(folder)) is None:
        if measured is not None and measured.problems:
            return CellResult(cell.name, cell.options, run_seed, "failed", problems=measured.problems)
        return CellResult(cell.name, cell.options, run_seed, "open")
    return _finished(cell, measured, summary, folder, seed)


def _finished(cell: Cell, measured: Measured, summary: Summary, folder: Path, seed: int) -> CellResult:
    alone = measured.at_once == 1
    return CellResult(
        cell.name,
        cell.options,
        cell.config.training.seed,
        "finished",
        loss=compare(*measured.held_out.pair, seed) if measured.held_out else None,
        general=compare(*measured.general.pair, seed) if measured.general else None,
        scores=read_scores(folder, summary.best_step) if cell.config.training.generate else {},
        score_intervals=measured.scores.get(str(summary.best_step), {}),
        steps=summary.steps,
        seconds=summary.tokens / summary.tokens_per_second if alone else None,
        tokens_per_second=summary.tokens_per_second if alone else None,
        peak_memory_mib=summary.peak_memory_mib if alone else None,
        trainable_parameters=summary.trainable_parameters,
    )


def _settings(cells: Sequence[CellResult]) -> list[Setting]:
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        options = {key: value for key, value in cell.options.items() if key != SEED}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(cell)
    return [
        Setting({key: value for key, value in group[0].options.items() if key != SEED}, tuple(group))
        for group in groups.values()
    ]


def _from_best(
    best: Setting, other: Setting, measured: Mapping[str, Measured | None], seed: int
) -> SeedComparison | None:
    """The other setting compared with the best one, on the seeds that both have."""
    if other is best:
        return None
    pairs = []
    for one in best.cells:
        for two in other.cells:
            a, b = measured.get(one.name), measured.get(two.name)
            if one.seed == two.seed and two.loss and a and b and a.held_out and b.held_out and a.base == b.base:
                pairs.append((a.held_out.pair[1], b.held_out.pair[1]))
    if not pairs:
        return None
    ones, others = zip(*pairs, strict=True)
    return compare_over_seeds(ones, others, seed)


def _comparable(settings: Sequence[Setting], repeat: str) -> Sequence[Setting]:
    """Those that may be the best: a mean over seeds is not compared with the one seed by which it was chosen."""
    most = max((len(setting.cells) for setting in settings), default=0)
    return [setting for setting in settings if repeat == "all" or len(setting.cells) == most]


def _axis(cells: Sequence[CellResult], keys: Sequence[str]) -> str:
    """The learning rate if the study has several, else the option with the most numbers; '' if there is none."""

    def numbers(key: str) -> int:
        found = {cell.options.get(key) for cell in cells if _is_number(cell.options.get(key))}
        return len(found)

    if numbers(RATE) > 1:
        return RATE
    counted = {key: numbers(key) for key in keys if key != SEED}
    key = max(counted, key=lambda one: counted[one], default="")
    return key if counted.get(key, 0) > 1 else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _order(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if _is_number(value) else (True, 0.0, value_text(value))
