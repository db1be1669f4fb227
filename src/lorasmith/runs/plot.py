"""Plot the losses of runs as an image, in the user's language if a font for it is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.errors import MissingExtraError
from lorasmith.i18n import _
from lorasmith.system.fonts import drawable_language
from lorasmith.system.writing import new_file
from lorasmith.training.history import Points, read_losses


def short_names(runs: Sequence[Path]) -> list[str]:
    """The folder name of each run, or its whole path if two runs have the same name."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]


def plot_loss(runs: Sequence[Path], target: Path) -> None:
    """Plot the losses of `runs` into `target`, a .png or .svg file.

    Raises MissingExtraError if matplotlib is not installed, RunError if a run has no losses.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError(
            _("no loss plot: matplotlib is not installed. Install it with: pip install 'lorasmith[report]'")
        ) from None
    losses = [read_losses(run) for run in runs]
    matplotlib.use("Agg")
    with drawable_language():
        _draw(short_names(runs) if len(runs) > 1 else [""], losses, target)


def _draw(names: Sequence[str], losses: Sequence[tuple[Points, Points]], target: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (training, held_out) in zip(names, losses, strict=True):
        _curve(axes, name, training, held_out)
    axes.set(xlabel=_("step"), ylabel=_("loss (nats per target token)"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        with new_file(target) as staging:
            figure.savefig(staging, dpi=120, format=target.suffix.lower().removeprefix("."))
    finally:
        pyplot.close(figure)


def _curve(axes: Any, name: str, training: Points, held_out: Points) -> None:
    """The smoothed training loss of a run, and its held-out loss as a dashed line.

    One of several runs has a name, and both of its lines have the same color.
    """
    color = None
    if training:
        steps, values = zip(*training, strict=True)
        smoothed = _("training, smoothed")
        label = f"{name} {smoothed}".strip()
        (line,) = axes.plot(steps, smooth(values), linewidth=2, label=label)
        color = line.get_color()
        if not name:
            axes.plot(steps, values, linewidth=1, alpha=0.45, color=color, label=_("training"))
    if held_out:
        label = _("held out")
        axes.plot(
            *zip(*held_out, strict=True), "o--", color=color if name else "tab:orange", label=f"{name} {label}".strip()
        )


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential moving average with weight `keep` on the past, corrected for its bias to 0 as in Adam."""
    mean, out = 0.0, []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**n))
    return out
