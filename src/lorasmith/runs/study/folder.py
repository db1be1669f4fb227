"""The folder of a study:

STUDY/.lorasmith         marks the folder as ours; .lorasmith.lock exists beside it while a process trains
STUDY/plan.json          the options of every cell by its name, so that a changed file is recognized
STUDY/NAME/              the run folder of a cell
STUDY/results/NAME.json  what was measured when the cell had been trained: its losses by example
STUDY/study.json         the results of all cells; STUDY/study.html shows them
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lorasmith.config.study import Cell, Study
from lorasmith.config.toml import Config
from lorasmith.config.values import read_back
from lorasmith.errors import RunError
from lorasmith.i18n import _, counted
from lorasmith.report import Report
from lorasmith.system.locking import locked
from lorasmith.system.ownership import is_marked, mark
from lorasmith.system.writing import write_file, writing
from lorasmith.training.run_files import LOCK
from lorasmith.training.run_folder import flat_options, with_absolute_paths

PLAN, RESULTS, RESULT, PAGE = "plan.json", "results", "study.json", "study.html"
SHOWN = 5  # differences that a message lists
Options = dict[str, Any]


class _Plan(BaseModel):
    version: int = 1
    cells: dict[str, Options]


@contextmanager
def study_lock(folder: Path, report: Report) -> Iterator[None]:
    """Hold the lock of a study's folder, which is created. Raises RunError if it is in use or not a study's."""
    if folder.exists() and not folder.is_dir():
        raise RunError(_("{folder} is a file, not a folder. Choose another --output.", folder=folder))
    used = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if used and not is_marked(folder, "study"):
        raise RunError(
            _(
                "{folder} contains files, but not those of a study. Choose another --output.",
                folder=folder,
            )
        )
    with writing(folder, is_run=False):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, folder) as has_locks:
        if not has_locks:
            report.warn(
                _(
                    "{folder}: this file system does not support locks. Do not start two studies there at once.",
                    folder=folder,
                )
            )
        mark(folder, "study")
        yield


def settle(study: Study, report: Report) -> Study:
    """The study with the names that its cells had before, if it was started before; writes STUDY/plan.json.

    Raises RunError if the file of the study has changed so that a cell that it had is missing.
    """
    path, now = study.folder / PLAN, {cell.name: options_of(cell.config) for cell in study.cells}
    before = _plan_of(path).cells if path.is_file() else {}
    names, missing = dict[str, str](), list[str]()
    for name, then in before.items():
        found = next((new for new, options in now.items() if _equal(then, options)), None)
        if found is None:
            missing.append(name)
        else:
            names[found] = name
    if missing:
        raise RunError(*_changed(study, {name: before[name] for name in missing}, now))
    cells = _renamed(study, names)
    added = len(cells) - len(before)
    if before and added:
        report.say(
            _("{folder}: {added} added to the {known} that the study had.", folder=study.folder,
              added=counted(added, _("1 run is"), _("{count} runs are")), known=len(before))
        )  # fmt: skip
    plan = _Plan(cells={cell.name: options_of(cell.config) for cell in cells})
    write_file(path, plan.model_dump_json(indent=1) + "\n", is_run=False)
    return replace(study, cells=cells)


def options_of(config: Config) -> Options:
    """The options of a cell as JSON has them."""
    options: Options = json.loads(json.dumps(flat_options(with_absolute_paths(config))))
    return options


def _equal(then: Options, now: Options) -> bool:
    """Whether two cells have the same options; one that an older version did not have has its default value."""
    default = options_of(Config())
    return all(then.get(key, default[key]) == value for key, value in now.items()) and then.keys() <= now.keys()


def _renamed(study: Study, names: dict[str, str]) -> tuple[Cell, ...]:
    """The cells, those that are known under another name under that one."""
    cells, taken = list[Cell](), set(names.values())
    for cell in study.cells:
        name = names.get(cell.name, cell.name)
        while cell.name not in names and name in taken:
            name += "-2"
        taken.add(name)
        config = cell.config.model_copy(update={"output": str(study.folder / name)})
        cells.append(replace(cell, name=name, config=config))
    return tuple(cells)


def _plan_of(path: Path) -> _Plan:
    try:
        return read_back(path, _Plan)
    except (OSError, ValueError) as error:
        raise RunError(
            _(
                "{path}: not in the format that a study writes: {error}. Restore the file, or choose another --output.",
                path=path,
                error=error,
            )
        ) from None


def _changed(study: Study, missing: dict[str, Options], now: dict[str, Options]) -> Iterator[str]:
    """What to say about cells that the file no longer has."""
    yield _(
        "{folder}: the study that was started here has runs that its file does not have any more. Add runs by adding "
        "values to the grid; for other changes, choose another --output.",
        folder=study.folder,
    )
    for name, then in list(missing.items())[:SHOWN]:
        near = min(now.values(), key=lambda options: sum(options[key] != then.get(key) for key in options))
        differing = [key for key, value in near.items() if then.get(key) != value]
        for key in differing[:SHOWN]:
            yield _(
                "{name}: {key} was {before!r}, now {now!r}", name=name, key=key, before=then.get(key), now=near[key]
            )
