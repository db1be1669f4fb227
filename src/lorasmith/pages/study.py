"""The results of a study as a self-contained HTML page, in light or dark as the reader's system is set."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lorasmith.config.study import label, value_text
from lorasmith.i18n import _, listed
from lorasmith.pages.page import render_template
from lorasmith.preflight.estimate import duration
from lorasmith.runs.study.findings import axis_text, findings, verdict
from lorasmith.runs.study.result import CellResult, Curve, Setting, StudyResult
from lorasmith.system.writing import write_file
from lorasmith.version import installed_version

WIDTH, HEIGHT = 640, 320  # of a chart, in units of its SVG
COLORS = 6  # and shapes of points, which tell curves apart without colors, too
LONG_NAME = 36  # characters of a curve's name, of which two have no room beside each other
NEAR_BASE = 1.0  # a chart reaches up to the base model unless its loss is farther from all better ones than these are
ABOVE_BASE = 0.15  # how far above the base model's loss a chart reaches, relative to what the best run gained
SPREAD = 6  # a chart reaches so many times as far from the best loss as the median does
LOGARITHMIC = 5  # largest / smallest value from which on the horizontal axis is logarithmic


class Point(NamedTuple):
    """A run. clipped: it failed, or its loss is above the chart; then it is drawn at the upper edge."""

    x: float
    y: float
    clipped: bool
    title: str


class Line(NamedTuple):
    """A curve: its points, and the line through the medians, in pieces where a median is above the chart."""

    name: str
    color: int
    points: list[Point]
    pieces: list[str]
    best: str


class Tick(NamedTuple):
    """A labeled place on an axis."""

    at: float
    text: str


class Chart(NamedTuple):
    """A picture of the loss over one option. base: where the base model's loss is; None if that is above the chart."""

    title: str
    lines: list[Line]
    ticks: list[Tick]
    levels: list[Tick]
    base: float | None


class _Scale(NamedTuple):
    """The ranges of both axes of all charts of a study."""

    values: list[float]
    logarithmic: bool
    low: float
    high: float
    base: float

    def x(self, value: float) -> float:
        ends = [self._along(self.values[0]), self._along(self.values[-1])]
        across = (self._along(value) - ends[0]) / ((ends[1] - ends[0]) or 1.0)
        return round((0.03 + 0.94 * across) * WIDTH, 1)

    def y(self, loss: float) -> float:
        return round((self.high - min(loss, self.high)) / ((self.high - self.low) or 1.0) * HEIGHT, 1)

    def _along(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def write_page(result: StudyResult, path: Path) -> None:
    """Write the page. Raises RunError if it cannot be written."""
    write_file(path, render_page(result), is_run=False)


def render_page(result: StudyResult) -> str:
    """The page as HTML."""
    return render_template(
        "study.html",
        r=result,
        findings=findings(result),
        charts=charts(result),
        groups=[[_row(setting, result) for setting in curve.settings] for curve in result.curves],
        cells=[_cell(cell) for cell in result.cells],
        scored=any(cell.scores for cell in result.cells),
        width=WIDTH,
        height=HEIGHT,
        version=installed_version() or "",
        t=_texts(result),
    )


def picture(result: StudyResult, chart: Chart) -> str:
    """A chart as an SVG file of its own, in light or dark as the reader's system is set."""
    return render_template(
        "study_picture.svg", chart=chart, width=WIDTH, height=HEIGHT, t=_texts(result), legend=_legend(chart)
    )


def _legend(chart: Chart) -> list[tuple[Line, int, int]]:
    """The curves with the places of their names below the picture, two in a row if they are short enough."""
    columns = 2 if all(len(line.name) <= LONG_NAME for line in chart.lines) else 1
    return [
        (line, (WIDTH // 2) * (number % columns), HEIGHT + 76 + 22 * (number // columns))
        for number, line in enumerate(chart.lines)
    ]


def charts(result: StudyResult) -> list[Chart]:
    """The pictures of the loss over the option of the axis; none without such an option or without losses."""
    scale = _scale(result)
    if scale is None:
        return []
    parts = _parts(result, [curve for curve in result.curves if not curve.is_open])
    return [_chart(result, title, curves, scale) for title, curves in parts]


def _parts(result: StudyResult, curves: Sequence[Curve]) -> list[tuple[str, list[Curve]]]:
    """The curves of each chart with its title: all in one, or by the first option that makes them small enough.

    Without such an option, the first curve and the best one are in every chart, to compare the others with.
    """
    if len(curves) <= COLORS:
        return [("", list(curves))]
    for key in curves[0].options:
        groups: dict[str, list[Curve]] = {}
        for curve in curves:
            groups.setdefault(f"{label(key)} {value_text(curve.options.get(key))}", []).append(curve)
        if min(map(len, groups.values())) > 1 and max(map(len, groups.values())) <= COLORS:
            return list(groups.items())
    best = [curve for curve in curves[1:] if result.best is not None and curve.best.options == result.best.options]
    shared = [curves[0], *best[:1]]
    others, room = [curve for curve in curves if curve not in shared], COLORS - len(shared)
    return [("", [*shared, *others[start : start + room]]) for start in range(0, len(others), room)]


def _scale(result: StudyResult) -> _Scale | None:
    cells = [cell for cell in result.cells if result.axis in cell.options and cell.state != "open"]
    losses = [cell.loss.after for cell in cells if cell.loss]
    values = sorted({float(cell.options[result.axis]) for cell in cells if _is_number(cell.options[result.axis])})
    if not losses or len(values) < 2:
        return None
    base = max(cell.loss.before for cell in cells if cell.loss)
    low = min(losses)
    high = max(loss for loss in losses if loss <= max(base, low))
    if base - high <= NEAR_BASE * (high - low):
        high = min(max(*losses, base), base + ABOVE_BASE * (base - low)) if base > low else max(losses)
    if (middle := median(losses)) > low:  # a few runs that went wrong must not make all others one line
        high = min(high, low + SPREAD * (middle - low))
    room = 0.06 * ((high - low) or 1.0)
    return _Scale(values, values[0] > 0 and values[-1] / values[0] >= LOGARITHMIC, low - room, high + room, base)


def _chart(result: StudyResult, title: str, curves: Sequence[Curve], scale: _Scale) -> Chart:
    ticks = [Tick(scale.x(value), value_text(value)) for value in scale.values]
    return Chart(
        title,
        [_line(result, curve, number % COLORS, scale) for number, curve in enumerate(curves)],
        _thinned(ticks),
        [Tick(scale.y(loss), f"{loss:.{_digits(scale)}f}") for loss in _levels(scale.low, scale.high)],
        scale.y(scale.base) if scale.base < scale.high else None,
    )


def _line(result: StudyResult, curve: Curve, color: int, scale: _Scale) -> Line:
    points, pieces, piece = list[Point](), list[str](), list[str]()
    for setting in curve.settings:
        value = setting.options[result.axis]
        if not _is_number(value):
            continue
        points += [_point(cell, scale.x(value), scale) for cell in setting.cells if cell.state != "open"]
        if setting.median <= scale.high:
            piece.append(f"{scale.x(value):g},{scale.y(setting.median):g}")
        elif piece:
            pieces.append(" ".join(piece))
            piece = []
    pieces += [" ".join(piece)] if piece else []
    best = curve.best
    text = _("{loss:.4f} at {value}", loss=best.mean, value=value_text(best.options[result.axis]))
    return Line(curve.name, color, points, pieces, text if math.isfinite(best.mean) else _("failed"))


def _point(cell: CellResult, x: float, scale: _Scale) -> Point:
    loss = cell.loss.after if cell.loss else math.inf
    text = f"{loss:.4f}" if math.isfinite(loss) else _("failed")
    return Point(x, scale.y(loss), loss > scale.high, f"{cell.name}: {text}")


def _thinned(ticks: list[Tick]) -> list[Tick]:
    """The ticks whose labels do not touch, from the left."""
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or tick.at - kept[-1].at >= 4.5 * (len(tick.text) + len(kept[-1].text)):
            kept.append(tick)
    return kept


def _levels(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two losses."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2) if span / (power * factor) <= 7)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _digits(scale: _Scale) -> int:
    return max(2, 1 - math.floor(math.log10(scale.high - scale.low)))


def _row(setting: Setting, result: StudyResult) -> dict[str, str]:
    """The cells of a line of the table."""
    compared, losses = setting.from_best, setting.losses
    is_best = result.best is not None and setting.options == result.best.options
    loss = f"{setting.mean:.4f}" if math.isfinite(setting.mean) else _("failed") if setting.failed else "–"
    spread = f"{min(losses):.4f} – {max(losses):.4f}" if len(losses) > 1 else ""
    if setting.failed and losses:
        spread = _("{failed} of {all} seeds failed", failed=setting.failed, all=len(setting.cells))
    seconds, memory, trained = map(setting.mean_of, ("seconds", "peak_memory_mib", "trainable_parameters"))
    over_seeds = compared.seeds if compared else None
    return {
        "name": setting.name,
        "loss": loss,
        "spread": spread,
        "difference": f"{compared.difference:+.4f}" if compared else "",
        "interval": f"[{compared.examples.low:+.4f}, {compared.examples.high:+.4f}]" if compared else "",
        "seeds": f"[{over_seeds[0]:+.4f}, {over_seeds[1]:+.4f}]" if over_seeds else "",
        "verdict": _("the best") if is_best else verdict(compared),
        "tone": "good" if is_best else "bad" if compared and compared.exceeds_noise else "",
        "forgetting": "" if setting.forgetting is None else f"{setting.forgetting:+.4f}",
        "time": "" if seconds is None else duration(seconds),
        "memory": "" if memory is None else f"{memory:,.0f}",
        "trained": "" if trained is None else f"{trained:,.0f}",
    }


def _score(cell: CellResult, name: str) -> str:
    """A score before and after, with the interval of the difference: 'exact 10.0 → 60.0 [+38.0, +62.0]'."""
    before, after = cell.scores[name]
    text = f"{name.replace('_', ' ')} {before:.1f} → {after:.1f}"
    if name not in cell.score_intervals:
        return text
    low, high = cell.score_intervals[name]
    return f"{text} [{low:+.1f}, {high:+.1f}]"


def _cell(cell: CellResult) -> dict[str, str]:
    """The cells of a line of the table of all runs."""
    loss, general = cell.loss, cell.general
    scores = [_score(cell, name) for name in cell.scores]
    states = {"finished": _("finished"), "failed": _("failed"), "open": _("not trained yet")}
    return {
        "name": cell.name,
        "state": states[cell.state],
        "tone": "bad" if cell.state == "failed" else "",
        "loss": f"{loss.before:.4f} → {loss.after:.4f}" if loss else "",
        "interval": f"{loss.difference:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}]" if loss else "",
        "general": f"{general.difference:+.4f} [{general.low:+.4f}, {general.high:+.4f}]" if general else "",
        "scores": listed(scores),
        "time": "" if cell.seconds is None else duration(cell.seconds),
        "rate": "" if cell.tokens_per_second is None else f"{cell.tokens_per_second:,.0f}",
        "problem": cell.problems[0] if cell.problems else "",
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(result: StudyResult) -> dict[str, str]:
    """The labels of the page."""
    axis = axis_text(result.axis)
    return {
        "title": _("Study"),
        "base": _("base"),
        "data": _("training data"),
        "evaluated": _("evaluated on"),
        "examples": _("{examples} held-out examples, the same for all runs", examples=f"{result.examples:,}"),
        "machine": _("machine"),
        "threads": _("{threads} threads", threads=result.machine.get("threads", "")),
        "found": _("What was found"),
        "picture": _("Held-out loss over {axis}", axis=axis),
        "axis": axis,
        "base_line": _("base model"),
        "caption": _(
            "Each point is a run, and the lines join the medians over seeds. A cross at the upper edge is a run that "
            "failed or whose loss is above the picture."
        ),
        "settings": _("Settings"),
        "setting": _("setting"),
        "loss": _("loss"),
        "spread": _("over seeds"),
        "difference": _("difference to the best"),
        "interval": _("95% CI, examples"),
        "seeds": _("95% CI, seeds"),
        "verdict": _("verdict"),
        "forgetting": _("forgetting"),
        "time": _("time"),
        "memory": _("peak memory, MiB"),
        "trained": _("trained parameters"),
        "legend": _(
            "Loss is in nats per target token on the held-out examples; lower is better. Where there are several "
            "seeds, it is their mean. A difference counts as larger than the noise if both intervals exclude zero: the "
            "one over examples (paired bootstrap), and the one over seeds (Student's t on runs of the same seed). "
            "Forgetting is how much the loss on a small general text rose. Time is that of the training steps."
        ),
        "runs": _("All runs"),
        "run": _("run"),
        "state": _("state"),
        "change": _("change, 95% CI"),
        "scores": _("scores of answers"),
        "rate": _("tokens/s"),
    }
