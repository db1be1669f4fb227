"""Draw a curve as text: in braille characters, or in stars for terminals without them."""

from collections.abc import Sequence
from math import isfinite

from lorasmith.i18n import _

BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of a dot, by row and column in its cell


def curve(points: Sequence[tuple[int, float]], width: int = 72, height: int = 8, plain: bool = False) -> str:
    """Draw `points`, (step, value) with rising steps, in `height` lines of `width` characters and a line for the steps.

    Values that are not finite are left out; a single point is returned as numbers. plain: stars instead of braille.
    """
    points = [(step, value) for step, value in points if isfinite(value)]
    if len(points) < 2:
        return "  ".join(f"{step}: {value:.3f}" for step, value in points)
    low, high = min(value for _step, value in points), max(value for _step, value in points)
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    margin = max(map(len, labels)) + 1
    across, down = (1, 1) if plain else (2, 4)
    columns, rows = max(width - margin - 1, 1) * across, height * down
    heights = [round((high - value) / ((high - low) or 1.0) * (rows - 1)) for value in _columns(points, columns)]
    cells = [[0] * ((columns + across - 1) // across) for _row in range(height)]
    for column, (before, row) in enumerate(zip([heights[0], *heights], heights, strict=False)):
        for dot in {*range(before + 1, row), *range(row + 1, before), row}:  # connected to the previous column
            cells[dot // down][column // across] |= BRAILLE[dot % down][column % across]
    lines = [
        f"{label:>{margin}}{'|' if plain else '┤'}" + "".join(_char(bits, plain) for bits in line).rstrip()
        for label, line in zip(labels, cells, strict=True)
    ]
    first, last = str(points[0][0]), str(points[-1][0])
    return "\n".join([*lines, " " * (margin + 1) + first + last.rjust(width - margin - 1 - len(first))])


def curve_in_words(points: Sequence[tuple[int, float]], title: str) -> list[str]:
    """The first, lowest and last value of the curve, a line each, for screen readers."""
    points = [(step, value) for step, value in points if isfinite(value)]
    if not points:
        return []
    (first, begin), (low, lowest), (last, end) = points[0], min(points, key=lambda point: point[1]), points[-1]
    return [
        _("{title}: first {value:.3f} at step {step}", title=title, value=begin, step=first),
        _("{title}: lowest {value:.3f} at step {step}", title=title, value=lowest, step=low),
        _("{title}: last {value:.3f} at step {step}", title=title, value=end, step=last),
    ]


def _char(bits: int, plain: bool) -> str:
    return " " if not bits else "*" if plain else chr(0x2800 + bits)


def _columns(points: Sequence[tuple[int, float]], columns: int) -> list[float]:
    """The value at each column, by linear interpolation."""
    first, last = points[0][0], points[-1][0]
    values, at = [], 0
    for column in range(columns):
        step = first + (last - first) * column / max(columns - 1, 1)
        while at < len(points) - 2 and points[at + 1][0] < step:
            at += 1
        (left, low), (right, high) = points[at], points[at + 1]
        values.append(low + (high - low) * (step - left) / ((right - left) or 1))
    return values
