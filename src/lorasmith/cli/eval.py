"""lorasmith eval: the adapter against its base on held-out examples."""

import argparse

from lorasmith.cli.flags import Parser
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
    """Prints both losses and the interval of their difference."""
    raise NotImplementedError("eval is not wired to the evaluation yet")
