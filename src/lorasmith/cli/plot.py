"""lorasmith plot: plot the losses of runs in the terminal, and as an image."""

import argparse
import json
from pathlib import Path

from lorasmith.cli.flags import Parser
from lorasmith.cli.screen import Screen
from lorasmith.errors import ConfigError, LorasmithError, RunError
from lorasmith.i18n import _

FORMATS = (".png", ".svg")


def parser() -> Parser:
    """The options: runs, and the image file."""
    about = _("Plot the losses of one or more runs as curves in the terminal and, with --output, as an image.")
    parser = Parser("plot", "RUN ...", about)
    parser.own.add_argument("runs", metavar="RUN", nargs="+", help=_("Run folders"))
    parser.own.add_argument("--output", metavar="FILE", help=_("Image file to write (.png or .svg)"))
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Plot the losses. Raises ConfigError with every problem."""
    from lorasmith.runs.plot import plot_loss, short_names, smooth
    from lorasmith.training.history import read_losses

    runs = [Path(run).expanduser() for run in args.runs]
    target = Path(args.output).expanduser() if args.output else None
    problems = [*_unreadable(runs), *_wrong_target(target)]
    if problems:
        raise ConfigError(*problems)
    curves = {}
    with Screen(json=args.json) as screen:
        for name, folder in zip(short_names(runs), runs, strict=True):
            training, held_out = read_losses(folder)
            steps, losses = zip(*training, strict=True)
            title = _(
                "{name}: training loss (smoothed); held-out loss: {losses}", name=name, losses=_held_out_text(held_out)
            )
            screen.curve(list(zip(steps, smooth(losses), strict=True)), title)
            curves[str(folder)] = {"training": training, "held_out": held_out}
        if target is not None:
            plot_loss(runs, target)
            screen.say(_("Wrote {file}", file=target))
    if args.json:
        print(json.dumps({"runs": curves, "picture": str(target) if target else None}, ensure_ascii=False))
    return 0


def _held_out_text(held_out: list[tuple[int, float]]) -> str:
    if not held_out:
        return _("not evaluated")
    best, lowest = min(held_out, key=lambda point: point[1])
    return _(
        "{first:.3f} -> {last:.3f}, lowest {lowest:.3f} after step {step}",
        first=held_out[0][1],
        last=held_out[-1][1],
        lowest=lowest,
        step=best,
    )


def _unreadable(runs: list[Path]) -> list[str]:
    from lorasmith.training.history import read_losses

    problems: list[str] = []
    for folder in runs:
        try:
            if not read_losses(folder)[0]:
                raise RunError(_("{run}: no training step has finished yet, so there is no loss to plot.", run=folder))
        except LorasmithError as error:
            problems += error.problems
    return problems


def _wrong_target(target: Path | None) -> list[str]:
    if target is None:
        return []
    if target.suffix.lower() not in FORMATS:
        return [_("--output: {file}: the file name must end in .png or .svg", file=target)]
    if not target.absolute().parent.is_dir():
        return [_("--output: the folder {folder} does not exist. Create it first.", folder=target.parent)]
    return []
