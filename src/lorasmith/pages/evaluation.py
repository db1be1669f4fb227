"""An evaluation as a self-contained HTML page, in light or dark as the reader's system is set."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorasmith.evaluation.results import Evaluation
from lorasmith.i18n import _, counted, listed
from lorasmith.pages.page import render_template
from lorasmith.runs.plot import smooth
from lorasmith.system.writing import write_file
from lorasmith.training.history import read_losses
from lorasmith.version import installed_version

WIDTH, HEIGHT = 640, 200  # of a loss curve, in units of its SVG
MOST_POINTS = 500  # of a curve; more cannot be seen


class LossCurve(NamedTuple):
    """The loss of a run: lines and dots as points of an SVG, and the ends of the loss and step axes."""

    name: str
    training: str
    held_out: str
    dots: list[tuple[float, float]]
    low: float
    high: float
    first: int
    last: int


def write_page(evaluation: Evaluation, runs: Sequence[Path], path: Path) -> None:
    """Write the page to `path`; `runs` are the folders of the adapters, in order. Raises RunError if that fails."""
    named = zip(evaluation.adapters, runs, strict=True)
    curves = [curve for adapter, run in named if (curve := loss_curve(run, adapter.name))]
    text = render_template(
        "eval.html",
        e=evaluation,
        groups=list(evaluation.groups()),
        curves=curves,
        width=WIDTH,
        height=HEIGHT,
        version=installed_version() or "",
        t=_texts(evaluation),
    )
    write_file(path, text, is_run=False)


def loss_curve(run: Path, name: str) -> LossCurve | None:
    """The loss curve of a run folder; None for an adapter folder, or with fewer than two finite losses."""
    if not (run / "metrics.jsonl").is_file():
        return None
    training, held_out = read_losses(run)
    finite = [(step, loss) for step, loss in training if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    steps, losses = zip(*finite, strict=True)
    smoothed = list(zip(steps, smooth(losses), strict=True))
    thinned = [*smoothed[: -1 : math.ceil(len(smoothed) / MOST_POINTS)], smoothed[-1]]
    values = [loss for _step, loss in [*smoothed, *held_out]]
    low, high, last = min(values), max(values), steps[-1]
    first = min(step for step, _loss in [*finite, *held_out])

    def place(point: tuple[int, float]) -> tuple[float, float]:
        across = (point[0] - first) / ((last - first) or 1)
        down = (high - point[1]) / ((high - low) or 1.0)
        return round(across * WIDTH, 1), round(down * HEIGHT, 1)

    dots = [place(point) for point in held_out]
    return LossCurve(name, _line([place(point) for point in thinned]), _line(dots), dots, low, high, first, last)


def _line(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _texts(evaluation: Evaluation) -> dict[str, str]:
    """The labels of the page."""
    return {
        "title": _("Evaluation"),
        "base": _("base"),
        "adapter": _("adapter"),
        "measured": _("evaluation data"),
        "examples": _(
            "{examples}: {files}",
            examples=counted(evaluation.adapters[0].loss.examples, _("1 example"), _("{count} examples")),
            files=listed(Path(file).name for file in evaluation.data),
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
