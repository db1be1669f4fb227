"""lorasmith demo: a small real model learns from real conversations while one watches."""

import argparse
import json
from dataclasses import asdict

from lorasmith.cli.flags import Parser, positive
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _


def parser() -> Parser:
    """The demo's few flags; `train` has all."""
    parser = Parser("demo", "", _("Train a small real model on real conversations, in minutes, and show what changed."))
    parser.own.add_argument("--steps", metavar="N", type=positive, help=_("steps of training (default: 32)"))
    parser.own.add_argument("--output", metavar="RUN", help=_("folder of the run (default: runs/demo)"))
    parser.add_switch("--overwrite", _("train again where the run is finished already"))
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Fetches what is missing, trains, shows; 0 when the run is finished. Raises LorasmithError."""
    from lorasmith.demo import demo

    given = {name: value for name, value in (("steps", args.steps), ("output", args.output)) if value is not None}
    with Screen(json=args.json) as screen:
        summary = demo(screen, overwrite=args.overwrite, **given)
    if args.json:
        print(json.dumps(asdict(summary)))
    return 0
