"""lorasmith combine: combine several adapters of one base model into one."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.cli.eval import show
from lorasmith.cli.flags import Parser, base_of, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.combine import CombineConfig, prunes
from lorasmith.config.values import check
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.adapters.combine import Combination

LAYERS_SHOWN = 10
EXACT = 1e-6  # relative error up to which only rounding to float32 is left
FAR = 0.1  # from here on, what approximates the sum is something else


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Combine several adapters of one base model into one adapter, and print how far it is from the exact weighted "
        "sum of their changes."
    )
    parser = Parser("combine", "ADAPTER[=WEIGHT] [ADAPTER[=WEIGHT] ...] --output DIR", about)
    parser.own.add_argument(
        "adapters", metavar="ADAPTER[=WEIGHT]", nargs="+",
        help=_("Run or adapter folder, and its weight (default: 1); a negative weight subtracts it"),
    )  # fmt: skip
    parser.own.add_argument("--output", metavar="DIR", required=True, help=_("Folder for the combined adapter"))
    parser.own.add_argument(
        "--data", dest="held_out", metavar="FILE", nargs="+", default=[],
        help=_("Also compute the loss of the result, and of the adapters, on the rows of these files"),
    )  # fmt: skip
    parser.add_switch("--overwrite", _("Replace the contents of --output"))
    parser.add_json()
    parser.add_section("combine")
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Combine the adapters, and evaluate the result if data is given. Raises LorasmithError."""
    model, options = base_of(args), check(CombineConfig, given(args).get("combine", {}), "combine")
    adapters = [weighted(word) for word in args.adapters]
    with importing():
        from lorasmith.adapters.combine import combine_adapters
        from lorasmith.runs.evaluate import EvaluationOptions, evaluate

    with Screen(json=args.json) as screen:
        checked = model if "model" in model.model_fields_set else None
        result = combine_adapters(adapters, args.output, options, checked, args.overwrite, screen)
        _show(result, screen)
        found = asdict(result)
        if args.held_out:
            others = [path for path, _weight in adapters] if result.can_be_compared else []
            evaluation = evaluate(
                [result.folder, *others], EvaluationOptions(files=tuple(args.held_out)), model, screen
            )
            show(evaluation, screen)
            found["evaluation"] = evaluation.to_json()
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def weighted(word: str) -> tuple[str, float]:
    """The folder and weight of ADAPTER[=WEIGHT]. Raises ConfigError if the weight is no number, or zero."""
    path, equals, text = word.rpartition("=")
    if not equals or Path(word).expanduser().is_dir():
        return word, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise ConfigError(
            _(
                "{word}: the weight after = must be a number other than 0, such as {path}=0.5. Leave an adapter out "
                "instead of giving it the weight 0.",
                word=word,
                path=path,
            )
        )
    return path, weight


def _show(result: "Combination", screen: Screen) -> None:
    """Show how far the result is from the exact sum: in all, and in the layers where it is furthest."""
    screen.say(
        _("Combined adapter: {folder} ({method}, rank {rank})",
          folder=result.folder, method=result.method, rank=result.rank)
    )  # fmt: skip
    if result.error <= EXACT:
        text = _("Relative error against the exact weighted sum: {error:.1e}, which is rounding", error=result.error)
        screen.say(text)
        return
    screen.say(_("Relative error against the exact weighted sum: {error:.1%} in all", error=result.error))
    worst = sorted(result.layers, key=lambda layer: -layer.relative)
    rows = [[layer.path, f"{layer.relative:.1%}"] for layer in worst[:LAYERS_SHOWN]]
    screen.table([_("layer"), _("relative error")], [[row] for row in rows])
    if len(worst) > LAYERS_SHOWN:
        more = len(worst) - LAYERS_SHOWN
        screen.say(_("layers not shown, with smaller errors: {more}; use --json to see them all", more=more))
    if text := _advice(result):
        screen.say(text)


def _advice(result: "Combination") -> str:
    """What a large error of the method means; empty if it is small."""
    if prunes(result.method):
        return _(
            "{method} does not aim at this sum, because it leaves out values on purpose. Whether that helps can be "
            "seen on held-out rows (--data).",
            method=result.method,
        )
    if result.error <= FAR:
        return ""
    if result.method == "linear":
        return _(
            "linear adds up A and B apart, so their product also contains A of one adapter times B of another. Use cat "
            "for the exact sum, or svd for the best of this rank."
        )
    return _("svd keeps the largest directions only. Give a larger --rank, or use cat for the exact sum.")
