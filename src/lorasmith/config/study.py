"""A study: a TOML file whose [study.grid] lists values of options, each combination of which is a run. Loads no torch.

    [study.grid]
    "training.learning_rate" = [1e-4, 3e-4, 1e-3]
    "lora.r" = [1, 8, 64]

With [[study.grid]], written several times, the study has the combinations of each of these grids.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from lorasmith.config.files import read_toml
from lorasmith.config.preference import METHODS
from lorasmith.config.toml import SECTIONS, Config
from lorasmith.config.values import Typed, check, did_you_mean
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed

MOST_CELLS = 2000
LONGEST_PART = 40  # characters of a value in the name of a cell
SEED, RATE = "training.seed", "training.learning_rate"
# What an option is called in the name of a cell; an empty name leaves only the value.
SHORT = {
    "learning_rate": "lr",
    "target_modules": "",
    "train_rows": "rows",
    "lora_alpha": "alpha",
    "batch_size": "batch",
    "method": "",
}
Grid = dict[str, list[Any]]


class StudySection(Typed):
    """The [study] section, apart from its grids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forget: Annotated[
        bool, Field(description=_("Also compute the loss on a small general text, to see what was forgotten"))
    ] = True
    repeat: Annotated[
        Literal["all", "best"],
        Field(
            description=_(
                "Which runs to repeat with the other values of training.seed: all of them, or, among those that differ "
                "only in the learning rate, the one that is best with the first seed"
            )
        ),
    ] = "all"


@dataclass(frozen=True)
class Cell:
    """One run of a study. options: the values of the grid that it has, by key; `config.output` is its run folder."""

    name: str
    options: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Study:
    """A study as its file describes it. keys: the options in its grids, in the order of the file."""

    folder: Path
    cells: tuple[Cell, ...]
    keys: tuple[str, ...]
    forget: bool = True
    repeat: Literal["all", "best"] = "all"


def load_study(path: Path, output: str | None = None) -> Study:
    """The study that the TOML file at `path` describes, in the folder `output`, that of the file, or runs/NAME.

    Held-out rows that are sampled are the same in all cells: where data.held_out_seed is not given, it is training.seed
    of the file. Raises ConfigError that lists every problem.
    """
    values = read_toml(path)
    section = values.pop("study", None)
    if not isinstance(section, dict) or not section.get("grid"):
        raise ConfigError(
            _(
                '{path}: no grid. List the values to compare under [study.grid], as in "lora.r" = [1, 8, 64]; '
                "to train with this file as it is, use lorasmith train --config {path}",
                path=path,
            )
        )
    grids = _grids(section.pop("grid"))
    wanted = check(StudySection, section, "study")
    folder = Path(output or values.get("output") or Path("runs") / path.stem).expanduser()
    base = check(Config, values)
    if not isinstance(base.data.held_out, str):
        values.setdefault("data", {}).setdefault("held_out_seed", base.training.seed)
    if wanted.repeat == "best" and not base.data.held_out:
        raise ConfigError(_("study.repeat: the best run is found by held-out examples. Set data.held_out."))
    keys = tuple(dict.fromkeys(key for grid in grids for key in grid))
    cells = tuple(_cells(values, grids, folder))
    _refuse_several_losses(cells)
    return Study(folder, cells, keys, wanted.forget, wanted.repeat)


def known_keys() -> list[str]:
    """Every option that a grid may name."""
    return [f"{name}.{key}" for name, part in SECTIONS.items() for key in part.model_fields]


def cell_name(options: Mapping[str, Any]) -> str:
    """A name for a cell that can be a folder's: 'r8_lr0.0003_seed1'."""
    return "_".join(_part(key, value) for key, value in options.items())


def value_text(value: Any) -> str:
    """A value of an option as people write it: 0.0003, all-linear, q_proj+v_proj."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "+".join(map(value_text, value))
    return str(value) if not isinstance(value, dict) else "+".join(f"{k}={value_text(v)}" for k, v in value.items())


def label(key: str) -> str:
    """The short name of an option: 'lr' for training.learning_rate."""
    name = key.rpartition(".")[2]
    return SHORT.get(name) or name


def setting_text(options: Mapping[str, Any]) -> str:
    """Options in words: 'full, lr 1e-05'."""
    return listed(
        value_text(value) if SHORT.get(key.rpartition(".")[2]) == "" else f"{label(key)} {value_text(value)}"
        for key, value in options.items()
    )


def _grids(found: Any) -> list[Grid]:
    """The grids of a file, each with lists of values. Raises ConfigError with every problem."""
    tables = found if isinstance(found, list) else [found]
    problems, grids = list[str](), list[Grid]()
    for table in tables:
        if not isinstance(table, dict):
            raise ConfigError(_("study.grid: must be a table of options with lists of values."))
        grid: Grid = {}
        for key, values in _flat(table):
            if key not in known_keys():
                near = [known for known in known_keys() if known.endswith(f".{key}")] or known_keys()
                problems.append(_("study.grid: unknown option {key!r}.", key=key) + did_you_mean(key, near))
            grid[key] = values if isinstance(values, list) else [values]
            if not grid[key]:
                problems.append(_("study.grid: {key} has no values.", key=key))
        grids.append(grid)
    count = sum(math.prod(map(len, grid.values())) for grid in grids)
    if count > MOST_CELLS:
        problems.append(
            _("study.grid: {count:,} runs; a study can have at most {most:,}.", count=count, most=MOST_CELLS)
        )
    if problems:
        raise ConfigError(*problems)
    return grids


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a grid; `lora.r = [1]` without quotation marks is a table in a table."""
    for key, value in table.items():
        if isinstance(value, dict) and key in SECTIONS:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _cells(values: Mapping[str, Any], grids: Sequence[Grid], folder: Path) -> Iterator[Cell]:
    """Every combination once. Raises ConfigError that names the cells with invalid options."""
    problems, seen, names = dict[str, None](), set[str](), set[str]()
    for grid in grids:
        for combination in itertools.product(*grid.values()):
            options = dict(zip(grid, combination, strict=True))
            name = cell_name(options)
            try:
                config = check(Config, _with(values, options))
            except ConfigError as error:
                problems |= dict.fromkeys(f"{name}: {text}" for text in error.problems)
                continue
            identity = config.model_dump_json(exclude={"output"})
            if identity in seen:
                continue
            if name in names:
                name += "-" + sha256(identity.encode()).hexdigest()[:6]
            seen.add(identity)
            names.add(name)
            yield Cell(name, options, config.model_copy(update={"output": str(folder / name)}))
    if problems:
        raise ConfigError(*problems)


def _refuse_several_losses(cells: Sequence[Cell]) -> None:
    """Raise ConfigError if the cells are trained on different losses, whose values cannot be compared."""
    losses = {}
    for cell in cells:
        method, options = cell.config.training.method, cell.config.preference
        losses[f"{method}: {options.model_dump_json()}" if method in METHODS else "examples"] = cell.name
    if len(losses) > 1:
        raise ConfigError(
            _(
                "study.grid: the runs {names} are trained on different losses, which cannot be compared. Make a study "
                "of each.",
                names=listed(losses.values()),
            )
        )


def _with(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the file with those of a cell."""
    combined = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key, value in options.items():
        section, _dot, name = key.partition(".")
        combined.setdefault(section, {})[name] = value
    return combined


def _part(key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    text = SHORT.get(name, name) + value_text(value)
    plain = re.sub(r"[^\w.+-]+", "-", text).strip("-.")
    if plain == text and len(text) <= LONGEST_PART:
        return text
    digest = sha256(json.dumps([key, value], default=str).encode()).hexdigest()[:6]
    return f"{plain[:LONGEST_PART]}-{digest}"
