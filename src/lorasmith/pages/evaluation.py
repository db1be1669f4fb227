"""An evaluation as one HTML file to send: nothing in it is fetched, and it is light or dark as its reader is."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorasmith.evaluation.results import Evaluation
from lorasmith.i18n import _
from lorasmith.pages.page import rendered
from lorasmith.runs.plot import smooth
from lorasmith.training.checkpoint import write_file
from lorasmith.training.history import read_losses
from lorasmith.version import installed_version

WIDTH, HEIGHT = 640, 200  # of the curve, in the units of its picture
MOST_POINTS = 500  # of a curve: more cannot be seen


class Curve(NamedTuple):
    """The loss of a run: lines as points of SVG, and the ends of both axes."""

    name: str
    training: str
    held_out: str
    dots: list[tuple[float, float]]
    low: float
    high: float
    first: int
    last: int


def write_page(evaluation: Evaluation, runs: Sequence[Path], path: Path) -> None:
    """Write `path`; `runs` are the folders of the adapters in their order. Raises RunError if it cannot be written."""
    named = zip(evaluation.adapters, runs, strict=True)
    found = [curve for adapter, run in named if (curve := curve_of(run, adapter.name))]
    text = rendered(
        "eval.html",
        e=evaluation,
        groups=list(evaluation.groups()),
        curves=found,
        width=WIDTH,
        height=HEIGHT,
        version=installed_version() or "",
        t=_texts(evaluation),
    )
    write_file(path, text, is_run=False)


def curve_of(run: Path, name: str) -> Curve | None:
    """The loss curve of a run folder; None for a bare adapter, or where fewer than two steps were written."""
    if not (run / "metrics.jsonl").is_file():
        return None
    training, measured = read_losses(run)
    finite = [(step, loss) for step, loss in training if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    steps, losses = zip(*finite, strict=True)
    smoothed = list(zip(steps, smooth(losses), strict=True))
    thinned = [*smoothed[: -1 : math.ceil(len(smoothed) / MOST_POINTS)], smoothed[-1]]
    values = [loss for _step, loss in [*smoothed, *measured]]
    low, high, last = min(values), max(values), steps[-1]
    first = min(step for step, _loss in [*finite, *measured])

    def place(point: tuple[int, float]) -> tuple[float, float]:
        across = (point[0] - first) / ((last - first) or 1)
        down = (high - point[1]) / ((high - low) or 1.0)
        return round(across * WIDTH, 1), round(down * HEIGHT, 1)

    dots = [place(point) for point in measured]
    return Curve(name, _line([place(point) for point in thinned]), _line(dots), dots, low, high, first, last)


def _line(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _texts(evaluation: Evaluation) -> dict[str, str]:
    """All words of the page that are not the evaluation's own."""
    return {
        "title": _("Evaluation"),
        "base": _("base"),
        "adapter": _("adapter"),
        "measured": _("evaluation data"),
        "examples": _(
            "{examples} examples: {files}",
            examples=evaluation.adapters[0].loss.examples,
            files=", ".join(Path(file).name for file in evaluation.data),
        ),
        "answered": _("generated answers"),
        "answers": _(
            "to {answers} of these examples, by the base model and by each adapter", answers=len(evaluation.samples)
        ),
        "better": _("Comparison with the base model"),
        "value": _("value"),
        "difference": _("difference"),
        "interval": _("95% CI"),
        "real": _("is the difference significant?"),
        "legend": _(
            "Loss is in nats per target token; lower is better, and perplexity is its exponential. For all "
            "other metrics higher is better, on a scale from 0 to 100 except for custom metrics. chrF, F1 and "
            "ROUGE-L are averaged over the answers; BLEU is computed over all answers together. Intervals come "
            "from a paired bootstrap over the examples."
        ),
        "trained": _("Training curves"),
        "step": _("step"),
        "training": _("training loss, smoothed"),
        "held_out": _("held-out loss"),
        "side": _("Answers side by side"),
        "reference": _("reference answer"),
        "cut": _("truncated at the length limit"),
        "nothing": _("(empty)"),
    }
