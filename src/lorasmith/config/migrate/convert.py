"""Find out whose configuration a file is, and convert it to one of ours."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lorasmith.config.migrate import axolotl, llama_factory, mlx_lm, ms_swift, trl
from lorasmith.config.migrate.migration import Migration
from lorasmith.config.migrate.reading import Foreign, read_foreign
from lorasmith.config.toml import Config, commented_toml
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed

PROGRAMS: dict[str, ModuleType] = {part.NAME: part for part in (llama_factory, axolotl, ms_swift, trl, mlx_lm)}
FEWEST = 2  # keys by which a program is recognized
EXAMPLES = 4  # keys of each program that the message names


def convert(path: Path, given: Mapping[str, Any]) -> tuple[Config, Migration]:
    """Our configuration for a file of another program, and what became of its keys.

    given: the options of the command line by section, which take precedence. Raises ConfigError with every problem.
    """
    foreign = read_foreign(path)
    program = foreign.program or _recognize(foreign)
    migration = Migration(foreign, program, given)
    PROGRAMS[program].convert(migration)
    return migration.finish(), migration


def converted_toml(config: Config, migration: Migration) -> str:
    """The TOML file: each key with its description and where its value is from; at the top, what was left out."""
    return commented_toml(config, {}, migration.comments, migration.head())


def _recognize(foreign: Foreign) -> str:
    """The program that has the most keys of its own in the file. Raises ConfigError if that is none or not clear."""
    found = {name: part.SIGNATURE & foreign.values.keys() for name, part in PROGRAMS.items()}
    best, second = sorted(found, key=lambda name: -len(found[name]))[:2]
    if len(found[best]) >= FEWEST and len(found[best]) > len(found[second]):
        return best
    if len(found[best]) >= FEWEST:
        raise ConfigError(
            _(
                "{file}: has keys of {first} ({keys}) and as many of {second} ({more}). Remove those of one program.",
                file=foreign.path,
                first=best,
                keys=listed(sorted(found[best])),
                second=second,
                more=listed(sorted(found[second])),
            )
        )
    known = "; ".join(f"{name}: {listed(sorted(part.SIGNATURE)[:EXAMPLES])}" for name, part in PROGRAMS.items())
    raise ConfigError(
        _(
            "{file}: not recognized as a training configuration. It needs at least {count} keys of one program, such "
            "as {known}.",
            file=foreign.path,
            count=FEWEST,
            known=known,
        )
    )
