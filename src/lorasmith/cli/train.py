"""lorasmith train: examples in, a tested adapter out."""

import argparse
import json
from dataclasses import asdict

from lorasmith.cli.flags import Parser, config_of
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _


def parser() -> Parser:
    """The flags: the verb's own, then every field of the configuration."""
    parser = Parser(
        "train",
        _("Train a LoRA adapter on files of examples and measure it on held-out ones."),
    )
    parser.own.add_argument(
        "files", metavar="DATA", nargs="*", help=_("files of examples (also as --data)")
    )
    parser.own.add_argument(
        "--resume",
        action="store_true",
        help=_("go on where the run in --output stopped"),
    )
    parser.own.add_argument(
        "--overwrite",
        action="store_true",
        help=_("replace the run that is in --output"),
    )
    parser.own.add_argument(
        "--json",
        action="store_true",
        help=_("the last line of stdout is one JSON object"),
    )
    parser.add_config()
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when the run is finished. Raises LorasmithError."""
    config = config_of(args)
    from lorasmith.run import train

    screen = Screen(json=args.json)
    with screen:
        summary = train(config, screen, resume=args.resume, overwrite=args.overwrite)
    if args.json:
        print(json.dumps(asdict(summary)))
    return 0
