"""lorasmith generate: answers for a prompt, a file of prompts or a pipe."""

import argparse

from lorasmith.cli.flags import Parser
from lorasmith.i18n import _


def parser() -> Parser:
    """Which adapter, which prompts, how replies are drawn."""
    about = _("Answer a prompt, or every line of a file or of standard input.")
    parser = Parser("generate", "RUN [PROMPT]", about)
    parser.own.add_argument("run", metavar="RUN", help=_("run or adapter folder"))
    parser.own.add_argument("prompt", metavar="PROMPT", nargs="?", help=_("the prompt; standard input if not given"))
    parser.own.add_argument("--file", metavar="FILE", help=_("file of prompts: one a line, or JSONL as for training"))
    parser.add_json()
    parser.add_base()
    parser.add_section("sampling")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints one answer for each prompt."""
    raise NotImplementedError("generate is not wired to the engine yet")
