"""How long the rows are: a histogram, with what was cut."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lorasmith.model.row import Example
from lorasmith.preflight.rows import stops

BARS = 8
NICE = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64, 80, 100)


@dataclass(frozen=True)
class Bar:
    """Rows of `low` to `high` tokens: how many, and how many of them were cut at that length."""

    low: int
    high: int
    rows: int
    cut: int


def histogram(examples: Sequence[Example], stop_ids: Collection[int]) -> list[Bar]:
    """At most about `BARS` bars of one round width, from the shortest row to the longest, its last token counted."""
    lengths = [example.useful_length + 1 for example in examples]
    cut = [length for length, e in zip(lengths, examples, strict=True) if not stops(e, stop_ids)]
    low, high = min(lengths), max(lengths)
    width = _width((high - low + 1) / BARS)
    first, last = (low - 1) // width, (high - 1) // width
    bars = []
    for number in range(first, last + 1):
        ends = range(number * width + 1, (number + 1) * width + 1)
        bars.append(
            Bar(ends[0], ends[-1], sum(length in ends for length in lengths), sum(length in ends for length in cut))
        )
    return bars


def _width(least: float) -> int:
    """The smallest round number that is not below `least`."""
    scale = 1
    while True:
        for nice in NICE:
            if nice * scale >= least:
                return nice * scale
        scale *= 100
