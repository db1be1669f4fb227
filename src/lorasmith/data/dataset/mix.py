"""Several files with weights: what part of an epoch comes from each. `a.jsonl:0.7 b.parquet:0.3`."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.errors import ConfigError
from lorasmith.i18n import _

T = TypeVar("T")


@dataclass(frozen=True)
class Mix:
    """The weight of each file, and the file of each row by its source."""

    weights: Mapping[str, float]
    file_of: Mapping[str, str]


def weighted(words: Sequence[str]) -> list[tuple[str, float | None]]:
    """Each file and its weight. A path that exists with the colon in its name wins over a weight.

    Raises ConfigError, with all that is wrong, for a weight that cannot be, a file named twice with weights, and for
    weights that only some files have.
    """
    pairs = [(name, float(part[1:]) if part else None) for name, part in map(without_weight, words)]
    problems = [
        _("data.data: {word}: the weight must be a number greater than 0.", word=word)
        for word, (_name, weight) in zip(words, pairs, strict=True)
        if weight is not None and not (math.isfinite(weight) and weight > 0)
    ]
    names = [name for name, _weight in pairs]
    if any(weight is not None for _name, weight in pairs):
        problems += [
            _(
                "data.data: {file} has no weight, but other files do. Write {file}:WEIGHT, or remove all weights.",
                file=name,
            )
            for name, weight in pairs
            if weight is None
        ]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [_("data.data: {file} is given twice. Give it once, with one weight.", file=name) for name in twice]
    if problems:
        raise ConfigError(*problems)
    return pairs


def without_weight(word: str) -> tuple[str, str]:
    """The name of a file or data set, and ':0.7' or nothing."""
    name, colon, number = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, ""
    try:
        float(number)
    except ValueError:
        return word, ""
    return name, f":{number}"


def mixed(rows: Sequence[T], source: Callable[[T], str], mix: Mix, seed: int) -> tuple[list[T], list[str]]:
    """As many rows as there are, of each file as many as its weight says; and a sentence for each file.

    A file with too few rows repeats all of them, and once more some that the seed draws; of one with too many, the
    seed draws some.
    """
    by_file: dict[str, list[T]] = {name: [] for name in mix.weights}
    for row in rows:
        by_file[mix.file_of[source(row)]].append(row)
    weights = {name: mix.weights[name] for name, found in by_file.items() if found}
    taken, notes = list[T](), list[str]()
    for index, (name, count) in enumerate(_counts(weights, len(rows)).items()):
        found = by_file[name]
        whole, rest = divmod(count, len(found))
        drawn = sorted(random.Random(f"mix-{seed}-{index}").sample(range(len(found)), rest))
        taken += found * whole + [found[i] for i in drawn]
        notes.append(_said(name, count, len(rows), len(found)))
    return taken, notes


def _counts(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in these proportions that add up to `total`: the largest remainders are rounded up."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _said(name: str, count: int, total: int, there: int) -> str:
    numbers = {"file": name, "count": f"{count:,}", "part": f"{count / total:.0%}", "there": f"{there:,}"}
    if count < there:
        text = _("{file}: {count} of its {there} rows per epoch, {part} of the epoch; {left} unused.")
        return text.format(**numbers, left=f"{there - count:,}")
    return _(
        "{file}: its {there} rows {times:.2f} times per epoch, {count} in all, {part} of the epoch.",
        **numbers,
        times=count / there,
    )
