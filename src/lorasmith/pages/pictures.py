"""The pictures of a report, drawn by matplotlib as SVG that takes its colors from the page, in two widths."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

from markupsafe import Markup

from lorasmith.errors import MissingExtraError
from lorasmith.i18n import _
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.runs.plot import smooth
from lorasmith.runs.report import RunReport
from lorasmith.system.fonts import drawable_language

WIDE, NARROW = 8.6, 4.0  # inches: of the picture for a desk, and of that for a phone
MOST_LINES = 400  # of layers in one picture; more cannot be told apart
MOST_KINDS = 24  # of modules, in rows of the picture of all layers
# Colors that stand for those of the page.
NAMES = {f"#00000{i}": name for i, name in enumerate(("ink", "dim", "line", "one", "two", "good", "bad"), 1)}
INK, DIM, LINE, ONE, TWO, GOOD, BAD = NAMES
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path", "svg.hashsalt": "lorasmith", "font.size": 9, "text.color": DIM, "axes.edgecolor": LINE,
    "axes.labelcolor": DIM, "xtick.color": DIM, "ytick.color": DIM, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": LINE, "legend.frameon": False, "legend.fontsize": 8.5,
    "axes.linewidth": 0.8, "grid.linewidth": 0.6, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.major.size": 0,
    "ytick.major.size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture as SVG for a desk and for a phone, and what it shows in words."""

    wide: Markup
    narrow: Markup
    title: str


def require_matplotlib() -> None:
    """Raise MissingExtraError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            _("The report needs matplotlib for its pictures. Install it with: pip install 'lorasmith[report]'")
        )


def pictures(report: RunReport) -> dict[str, Picture]:
    """The pictures for which there are figures. Raises MissingExtraError if matplotlib is not installed."""
    require_matplotlib()
    import matplotlib

    wanted: dict[str, tuple[str, float, Callable[[Any], None]]] = {}
    if len(report.subject.training) > 1:
        wanted["loss"] = (_("Loss over the steps of the training"), 3.1, lambda figure: _loss(figure, report))
    if rows := _intervals(report):
        height = 0.6 + 0.36 * len(rows)
        wanted["intervals"] = (
            _("Change of the loss in nats per token, with 95% CI; left of 0 is better"),
            height,
            lambda figure: _forest(figure, report),
        )
    usable = [one for one in report.spectra if one.rank > 1 and one.norm > 0]
    if usable:
        wanted["spectrum"] = (_("Singular values of every update"), 2.9, lambda figure: _spectrum(figure, usable))
    if kinds := {} if report.subject.is_whole_model else _kinds(usable):
        height = 1.0 + 0.24 * len(kinds)
        wanted["layers"] = (_("Effective rank by layer and module"), height, lambda figure: _layers(figure, kinds))
    with matplotlib.rc_context(STYLE), drawable_language():
        return {
            name: Picture(
                _svg(draw, WIDE, height, title, f"{name}-"), _svg(draw, NARROW, height, title, f"{name}-n-"), title
            )
            for name, (title, height, draw) in wanted.items()
        }


def _svg(draw: Callable[[Any], None], width: float, height: float, title: str, prefix: str) -> Markup:
    """Draw a picture of this size in inches, as an <svg> element whose ids start with `prefix`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(
        r"<metadata>.*?</metadata>", "", target.getvalue()[target.getvalue().index("<svg") :], flags=re.DOTALL
    )
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub("|".join(NAMES), lambda found: f"var(--{NAMES[found[0]]})", text)
    text = re.sub(r'(width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(id="|href="#|url\(#)', lambda found: found[1] + prefix, text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(title)}"', 1))


def _loss(figure: Any, report: RunReport) -> None:
    axes, subject = figure.subplots(), report.subject
    steps, values = zip(*subject.training, strict=True)
    axes.plot(steps, values, color=ONE, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth(values), color=ONE, linewidth=1.8, label=_("training, smoothed"))
    if subject.held_out:
        axes.plot(
            *zip(*subject.held_out, strict=True), "o--", color=TWO, linewidth=1.4, markersize=4, label=_("held out")
        )
    if report.end:
        ends = [report.end.first, report.end.last]
        label = _("trend of the last third")
        axes.plot(ends, [report.end.at(step) for step in ends], color=INK, linewidth=2.2, label=label)
    if subject.step and subject.steps and subject.step < subject.steps:
        axes.axvline(subject.step, color=GOOD, linewidth=1.2, linestyle=":", label=_("kept"))
    axes.set(xlabel=_("step"), ylabel=_("loss (nats per token)"))
    axes.grid(axis="y")
    _legend(figure, axes)


def _legend(figure: Any, axes: Any) -> None:
    columns = 4 if figure.get_figwidth() > NARROW else 2
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)


def _intervals(report: RunReport) -> list[tuple[str, float, float, float]]:
    """(label, value, low, high) of each change of a loss."""
    found, rows = report.evidence, []
    for label, one in (
        (_("held-out examples"), found.learned),
        (_("training examples"), found.trained_on),
        (_("general text"), found.forgotten),
        (_("last step instead"), found.later),
    ):
        if one:
            rows.append((label, one.difference, one.low, one.high))
    return rows


def _forest(figure: Any, report: RunReport) -> None:
    axes, rows = figure.subplots(), _intervals(report)
    axes.axvline(0, color=DIM, linewidth=1)
    for i, (_label, value, low, high) in enumerate(rows):
        color = GOOD if high < 0 else BAD if low > 0 else DIM
        axes.plot([low, high], [i, i], color=color, linewidth=2.4, solid_capstyle="round")
        axes.plot([value], [i], "o", color=color, markersize=6)
    axes.set_yticks(range(len(rows)), [label for label, *_rest in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _spectrum(figure: Any, layers: Sequence[LayerSpectrum]) -> None:
    axes = figure.subplots()
    step = max(len(layers) // MOST_LINES, 1)
    alpha = max(min(8 / len(layers), 0.6), 0.06)
    for one in layers[::step]:
        axes.plot(range(1, one.rank + 1), _relative(one), color=ONE, linewidth=0.8, alpha=alpha)
    rank = max(one.rank for one in layers)
    full = [_relative(one) for one in layers if one.rank == rank]
    middle = [median(values) for values in zip(*full, strict=True)]
    axes.plot(
        range(1, rank + 1), middle, "o-", color=INK, linewidth=2, markersize=3 if rank <= 32 else 0, label=_("median")
    )
    axes.plot([], [], color=ONE, linewidth=1, label=_("each update"))
    axes.set(xlabel=_("direction, strongest first"), ylabel=_("relative to the strongest"), ylim=(0, 1.04))
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y")
    _legend(figure, axes)


def _relative(one: LayerSpectrum) -> list[float]:
    """The singular values relative to the largest; of experts, their medians."""
    values: list[float] = (one.values_ES / one.values_ES[:, :1]).nanquantile(0.5, dim=0).tolist()
    return values


def _kinds(layers: Sequence[LayerSpectrum]) -> dict[str, dict[int, float]]:
    """The part of the rank in use, by kind of module and layer; empty if there are not several layers."""
    kinds: dict[str, dict[int, float]] = {}
    for one in layers:
        if one.layer is not None:
            kinds.setdefault(one.kind, {})[one.layer] = one.share
    several = any(len(found) > 1 for found in kinds.values())
    return dict(list(kinds.items())[:MOST_KINDS]) if several else {}


def _layers(figure: Any, kinds: dict[str, dict[int, float]]) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    for row, shares in enumerate(kinds.values()):
        for layer, share in shares.items():
            axes.add_patch(Rectangle((layer - 0.46, row - 0.44), 0.92, 0.88, facecolor=ONE, alpha=share, linewidth=0))
    last = max(layer for shares in kinds.values() for layer in shares)
    axes.set(xlim=(-0.6, last + 0.6), ylim=(len(kinds) - 0.4, -0.6), xlabel=_("layer"))
    axes.set_yticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds])
    axes.locator_params(axis="x", integer=True)
    axes.spines[["left", "bottom"]].set_visible(False)
    shades = [Rectangle((0, 0), 1, 1, facecolor=ONE, alpha=share, linewidth=0) for share in (0.25, 0.5, 0.75, 1.0)]
    labels = ["25%", "50%", "75%", _("100% of the rank")]
    figure.legend(shades, labels, loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.2)
