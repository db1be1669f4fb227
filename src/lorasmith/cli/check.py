"""lorasmith check: check a training before starting it."""

import argparse
import json

from lorasmith.cli.flags import Parser, config_of, html_path
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _


def parser() -> Parser:
    """The options of `train`, and how the result is shown."""
    parser = Parser(
        "check",
        "DATA ...",
        _("Check a training run before starting it: base model, data, target modules, memory and time."),
    )
    parser.own.add_argument("files", metavar="DATA", nargs="*", help=_("Training data files (same as --data)"))
    parser.add_html()
    parser.add_json()
    parser.add_config()
    return parser


def run(args: argparse.Namespace) -> int:
    """Show the result; returns 0 if training can start, with or without warnings, else 2. Raises LorasmithError."""
    config, page = config_of(args), html_path(args)
    with importing():
        from lorasmith.preflight.check import check
    from lorasmith.cli.check_result import show

    with Screen(json=args.json) as screen:
        result = check(config, screen)
        show(result, screen.console, plain=screen.plain)
        if page is not None:
            from lorasmith.pages.check import write_page

            write_page(result, page)
            screen.say(_("Wrote {file}", file=page))
    if args.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    return result.exit_code
