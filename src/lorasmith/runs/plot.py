"""The loss of runs as a picture, its words in the user's language where a font for it is there."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.errors import MissingExtraError
from lorasmith.i18n import _
from lorasmith.system.fonts import drawable_words
from lorasmith.training.history import Points, read_losses


def names_of(runs: Sequence[Path]) -> list[str]:
    """A short name for each run; the whole path where two would be alike."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]


def plot_loss(runs: Sequence[Path], target: Path) -> None:
    """Draw the runs' losses into `target`, .png or .svg.

    Raises MissingExtraError without matplotlib, RunError where a run has no losses.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError(
            _("no loss plot: matplotlib is not installed. Install it with: pip install 'lorasmith[report]'")
        ) from None
    losses = [read_losses(run) for run in runs]
    matplotlib.use("Agg")
    with drawable_words():
        _draw(names_of(runs) if len(runs) > 1 else [""], losses, target)


def _draw(names: Sequence[str], losses: Sequence[tuple[Points, Points]], target: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (training, measured) in zip(names, losses, strict=True):
        _curve(axes, name, training, measured)
    axes.set(xlabel=_("step"), ylabel=_("loss (nats per target token)"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        figure.savefig(staging, dpi=120, format=target.suffix.lower().removeprefix("."))
        staging.replace(target)
    finally:
        pyplot.close(figure)
        staging.unlink(missing_ok=True)


def _curve(axes: Any, name: str, training: Points, measured: Points) -> None:
    """One run. Of several (they have names) each is one colour: the smoothed training loss, dashed what is held out."""
    colour = None
    if training:
        steps, values = zip(*training, strict=True)
        smoothed = _("training, smoothed")
        label = f"{name} {smoothed}".strip()
        (line,) = axes.plot(steps, smooth(values), linewidth=2, label=label)
        colour = line.get_color()
        if not name:
            axes.plot(steps, values, linewidth=1, alpha=0.45, color=colour, label=_("training"))
    if measured:
        held_out = _("held out")
        own = colour if name else "tab:orange"
        axes.plot(*zip(*measured, strict=True), "o--", color=own, label=f"{name} {held_out}".strip())


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, without the bias of its start (as Adam corrects it)."""
    mean, out = 0.0, []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**n))
    return out
