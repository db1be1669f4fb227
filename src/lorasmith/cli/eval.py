"""lorasmith eval: the adapter against its base on held-out examples."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from lorasmith.cli.flags import Parser, base_of, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config import check
from lorasmith.data.config import DataConfig
from lorasmith.i18n import _


def parser() -> Parser:
    """Which adapter, which examples."""
    about = _("Held-out loss and perplexity of the adapter against its base, with a paired interval.")
    parser = Parser("eval", "RUN [DATA ...]", about)
    parser.own.add_argument("run", metavar="RUN", help=_("run or adapter folder"))
    parser.own.add_argument(
        "files", metavar="DATA", nargs="*", help=_("examples; the run's held-out ones if not given")
    )
    parser.add_json()
    parser.add_base()
    parser.add_section("data", only=("max_length", "too_long"))  # the template is the adapter's own
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints both losses and the interval of their difference. Raises LorasmithError."""
    model, limits = base_of(args), _limits(args)
    with importing():
        from lorasmith.measure import evaluate_run

    with Screen(json=args.json) as screen:
        result = evaluate_run(args.run, args.files, model, limits, screen)
        screen.say(str(result))
    if args.json:
        print(json.dumps({**asdict(result), "difference": result.difference}))
    return 0


def _limits(args: argparse.Namespace) -> DataConfig | None:
    """--max-length and --too-long, or None where neither was given."""
    data: dict[str, Any] = given(args).get("data", {})
    found = {key: value for key, value in data.items() if key != "data"}
    return check(DataConfig, found, "data") if found else None
