"""lorasmith info: what a folder holds, without loading a model."""

import argparse

from lorasmith.cli.flags import Parser
from lorasmith.i18n import _


def parser() -> Parser:
    """Which folder."""
    parser = Parser("info", "PATH", _("What a run or adapter folder holds. Loads no model."))
    parser.own.add_argument("path", metavar="PATH", help=_("run or adapter folder"))
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints what the folder says of itself."""
    raise NotImplementedError("info is not wired yet")
