"""The loss of runs as a picture, its words in the user's language where a font for it is there."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.config.files import read_objects
from lorasmith.errors import MissingExtraError, RunError
from lorasmith.i18n import _, foreign
from lorasmith.system.fonts import drawable_words

METRICS = "metrics.jsonl"
Points = list[tuple[int, float]]


def read_losses(run: Path) -> tuple[Points, Points]:
    """(step, loss) of training and (step, held-out loss) of a run's metrics.jsonl, also while it is being written.

    Raises RunError where there is no such file, or something else in it.
    """
    path = run / METRICS
    if not path.is_file():
        why = foreign("No such file or directory")
        raise RunError(_("{path}: cannot be read: {why}. Give a run folder.", path=path, why=why))
    try:
        lines = read_objects(path, RunError)
        training = [(int(line["step"]), float(line["loss"])) for line in lines if "loss" in line]
        measured = [(int(line["step"]), float(line["held_out_loss"])) for line in lines if "held_out_loss" in line]
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise RunError(_("{path}: not a valid metrics file: {error}", path=path, error=error)) from None
    return training, measured


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
        label = f"{name} {_('training, smoothed')}".strip()
        (line,) = axes.plot(steps, smooth(values), linewidth=2, label=label)
        colour = line.get_color()
        if not name:
            axes.plot(steps, values, linewidth=1, alpha=0.45, color=colour, label=_("training"))
    if measured:
        own = colour if name else "tab:orange"
        axes.plot(*zip(*measured, strict=True), "o--", color=own, label=f"{name} {_('held out')}".strip())


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, without the bias of its start (as Adam corrects it)."""
    mean, out = 0.0, []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**n))
    return out
