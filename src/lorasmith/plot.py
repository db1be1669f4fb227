"""The loss of runs as a picture. Words in it are English: a font for others may not be there."""

import json
from collections.abc import Sequence
from pathlib import Path

from lorasmith.i18n import _
from lorasmith.report import Report


def read_losses(run: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of training and (step, held-out loss) of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    measured = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    return training, measured


def plot_loss(runs: Sequence[Path], target: Path, report: Report) -> bool:
    """Draw the runs' losses into `target` (PNG); without matplotlib say so and return False."""
    try:
        import matplotlib
    except ImportError:
        report.warn(_("no picture of the loss: matplotlib is missing. pip install 'lorasmith[report]' mends it."))
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        training, measured = read_losses(run)
        label = run.name if len(runs) > 1 else ""
        steps, losses = zip(*training, strict=True)
        (line,) = axes.plot(steps, losses, linewidth=1, alpha=0.45, label=f"{label} training".strip())
        axes.plot(
            steps, smooth(losses), color=line.get_color(), linewidth=2, label=f"{label} training, smoothed".strip()
        )
        if measured:
            axes.plot(*zip(*measured, strict=True), "o--", color="tab:orange", label=f"{label} held out".strip())
    axes.set(xlabel="step", ylabel="loss (nats per learned token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120, format="png")
    pyplot.close(figure)
    return True


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, without the bias of its start (as Adam corrects it)."""
    mean, out = 0.0, []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**n))
    return out
