"""Mixing files by weight: `a.jsonl:0.7 b.parquet:0.3` says which part of an epoch comes from each file."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorasmith.i18n import _

T = TypeVar("T")


@dataclass(frozen=True)
class Mix:
    """The weight of each file, and the file of each row, by the row's source."""

    weights: Mapping[str, float]
    file_of: Mapping[str, str]


def mix_rows(rows: Sequence[T], source: Callable[[T], str], mix: Mix, seed: int) -> tuple[list[T], list[str]]:
    """An epoch of `len(rows)` rows in which each file has the share that its weight says; and a message for each file.

    A file with too few rows is repeated whole, and the rest is sampled from it without replacement, as are the rows of
    a file with too many.
    """
    by_file: dict[str, list[T]] = {name: [] for name in mix.weights}
    for row in rows:
        by_file[mix.file_of[source(row)]].append(row)
    weights = {name: mix.weights[name] for name, found in by_file.items() if found}
    taken, notes = list[T](), list[str]()
    for index, (name, count) in enumerate(_counts(weights, len(rows)).items()):
        found = by_file[name]
        whole, rest = divmod(count, len(found))
        sampled = sorted(random.Random(f"mix-{seed}-{index}").sample(range(len(found)), rest))
        taken += found * whole + [found[i] for i in sampled]
        notes.append(_describe(name, count, len(rows), len(found)))
    return taken, notes


def _counts(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in these proportions that add up to `total`: the largest remainders are rounded up."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _describe(name: str, count: int, total: int, there: int) -> str:
    numbers = {"file": name, "count": f"{count:,}", "part": f"{count / total:.0%}", "there": f"{there:,}"}
    if count < there:
        text = _("{file}: {count} of its {there} rows per epoch, {part} of the epoch; {left} unused.")
        return text.format(**numbers, left=f"{there - count:,}")
    return _(
        "{file}: its {there} rows {times:.2f} times per epoch, {count} in total, {part} of the epoch.",
        **numbers,
        times=count / there,
    )
