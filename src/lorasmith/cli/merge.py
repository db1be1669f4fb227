"""lorasmith merge: base and adapter as one plain model."""

import argparse

from lorasmith.cli.flags import Parser
from lorasmith.i18n import _


def parser() -> Parser:
    """Which adapter, where to."""
    about = _("Write base and adapter as one plain transformers folder, after comparing its logits with the adapter's.")
    parser = Parser("merge", "RUN --output DIR", about)
    parser.own.add_argument("run", metavar="RUN", help=_("run or adapter folder"))
    parser.own.add_argument("--output", metavar="DIR", required=True, help=_("folder of the merged model"))
    parser.add_switch("--overwrite", _("replace what is in --output"))
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Merges, compares, and only then names the folder."""
    raise NotImplementedError("merge is not wired to the export yet")
