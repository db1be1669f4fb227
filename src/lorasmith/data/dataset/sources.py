"""The words of data.data: a file, how many of its rows, and its weight, as in `a.jsonl#500:0.7`.

A file whose whole name looks like this takes precedence.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.data.read.files import DataFile
from lorasmith.errors import ConfigError, DataError
from lorasmith.i18n import _

ORDER = "rows-0"  # the seed of the order in which rows are sampled; training.seed has no influence on it


@dataclass(frozen=True)
class DataSource:
    """A file, saved dataset or dataset on a hub; the number of rows and the weight are None if not given."""

    name: str
    rows: int | None = None
    weight: float | None = None


def parse_sources(words: Sequence[str]) -> list[DataSource]:
    """What each word of data.data names.

    Raises ConfigError for an invalid number, for a file given twice with weights, and if only some files have weights.
    """
    sources = [_source(word) for word in words]
    problems = [
        _("data.data: {word}: the weight must be a number greater than 0.", word=word)
        for word, one in zip(words, sources, strict=True)
        if one.weight is not None and not (math.isfinite(one.weight) and one.weight > 0)
    ]
    problems += [_no_rows("data.data", word) for word, one in zip(words, sources, strict=True) if one.rows == 0]
    names = [one.name for one in sources]
    if any(one.weight is not None for one in sources):
        problems += [
            _(
                "data.data: {file} has no weight, but other files do. Write {file}:WEIGHT, or remove all weights.",
                file=one.name,
            )
            for one in sources
            if one.weight is None
        ]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [_("data.data: {file} is given twice. Give it once, with one weight.", file=name) for name in twice]
    if problems:
        raise ConfigError(*problems)
    return sources


def parse_held_out(word: str) -> DataSource:
    """What data.held_out names, which has no weight. Raises ConfigError for an invalid number."""
    name, number = _split_rows(word)
    if number and not int(number[1:]):
        raise ConfigError(_no_rows("data.held_out", word))
    return DataSource(name, int(number[1:]) if number else None)


def split_source(word: str) -> tuple[str, str]:
    """Split 'a.jsonl#500:0.7' into ('a.jsonl', '#500:0.7'); the second part is empty without numbers."""
    name, weight = _split_weight(word)
    name, rows = _split_rows(name)
    return name, rows + weight


def sample(found: DataFile, source: DataSource, most: int | None, option: str) -> DataFile:
    """`found` with as many rows as `source` says, and at most `most`: a random sample, in the order of the file.

    The sample of a file is the same in every run, and that of 500 rows is part of that of 1,000.

    Raises DataError if the file has fewer rows than `source` says.
    """
    there = len(found.records)
    if source.rows is not None and source.rows > there:
        text = _(
            "{option}: {file}#{rows}: the file has only {there} usable rows. Ask for fewer, or remove #{rows}; to "
            "repeat rows, mix files by weight.",
            option=option,
            file=found.name,
            rows=source.rows,
            there=f"{there:,}",
        )
        raise DataError(text)
    count = min(there if limit is None else limit for limit in (source.rows, most))
    if count >= there:
        return found
    order = list(range(there))
    random.Random(ORDER).shuffle(order)
    note = _(
        "{file}: a random sample of {count} of its {there} rows is used, the same in every run.",
        file=found.name,
        count=f"{count:,}",
        there=f"{there:,}",
    )
    records = [found.records[i] for i in sorted(order[:count])]
    return replace(found, records=records, notes=(*found.notes, note))


def _source(word: str) -> DataSource:
    name, weight = _split_weight(word)
    name, rows = _split_rows(name)
    return DataSource(name, int(rows[1:]) if rows else None, float(weight[1:]) if weight else None)


def _no_rows(option: str, word: str) -> str:
    return _("{option}: {word}: the number of rows must be at least 1.", option=option, word=word)


def _split_rows(word: str) -> tuple[str, str]:
    """Split 'a.jsonl#500' into ('a.jsonl', '#500')."""
    name, hash_sign, number = word.rpartition("#")
    is_number = number.isascii() and number.isdecimal() and len(number) < 16
    return (name, f"#{number}") if hash_sign and is_number and not Path(word).exists() else (word, "")


def _split_weight(word: str) -> tuple[str, str]:
    """Split 'a.jsonl:0.7' into ('a.jsonl', ':0.7')."""
    name, colon, number = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, ""
    try:
        float(number)
    except ValueError:
        return word, ""
    return name, f":{number}"
