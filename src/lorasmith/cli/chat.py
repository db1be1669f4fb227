"""lorasmith chat: talk to an adapter in the terminal."""

import argparse

from lorasmith.cli.flags import Parser
from lorasmith.i18n import _


def parser() -> Parser:
    """Which adapters, which base, how replies are drawn."""
    parser = Parser(
        "chat", "RUN ...", _("Talk to an adapter; /adapter NAME switches, /base compares, /help says more.")
    )
    parser.own.add_argument("runs", metavar="RUN", nargs="+", help=_("run or adapter folders; all share one base"))
    parser.own.add_argument("--system", metavar="TEXT", help=_("system message before the conversation"))
    parser.add_base()
    parser.add_section("sampling")
    return parser


def run(args: argparse.Namespace) -> int:
    """Talks until end of input or /quit."""
    raise NotImplementedError("chat is not wired to the engine yet")
