"""A histogram of the row lengths, with the number of truncated rows in each bar."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lorasmith.model.row import Example
from lorasmith.preflight.rows import ends_with_stop_token

BARS = 8  # at most about so many
ROUND_WIDTHS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64, 80, 100)


@dataclass(frozen=True)
class Bar:
    """The number of rows with `low` to `high` tokens, and how many of them are truncated."""

    low: int
    high: int
    rows: int
    cut: int


def histogram(examples: Sequence[Example], stop_ids: Collection[int]) -> list[Bar]:
    """About `BARS` bars of the same round width, from the shortest row to the longest.

    Lengths count the tokens up to the last target, itself included.
    """
    lengths = [example.useful_length + 1 for example in examples]
    cut = [length for length, e in zip(lengths, examples, strict=True) if not ends_with_stop_token(e, stop_ids)]
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
    """The smallest round number that is at least `least`."""
    scale = 1
    while True:
        for width in ROUND_WIDTHS:
            if width * scale >= least:
                return width * scale
        scale *= 100
