"""lorasmith verify: check an exported file against its certificate, or compare it with its run again."""

import argparse
import json
from functools import partial

from lorasmith.cli.export import show
from lorasmith.cli.flags import Parser, base_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Check that an exported file or folder is still the one of its certificate, or, with --against, compare it "
        "with a run and write a new certificate."
    )
    parser = Parser("verify", "PATH [--against RUN]", about)
    parser.own.add_argument("path", metavar="PATH", help=_("File or folder that lorasmith export wrote"))
    parser.own.add_argument("--against", metavar="RUN", help=_("Run or adapter folder to compare it with"))
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Check the file. Raises LorasmithError."""
    model = base_of(args)
    with importing():
        from lorasmith.export.verify import verify
        from lorasmith.runs.evaluate import some_held_out

    with Screen(json=args.json) as screen:
        rows = partial(some_held_out, path=args.against or "", report=screen)
        found = verify(args.path, args.against, model, screen, rows)
        show(found.content, screen)
        text = (
            _("{file} is the folder of its certificate ({name})", file=found.file, name=found.certificate.name)
            if found.file.is_dir()
            else _("{file} is the file of its certificate ({name})", file=found.file, name=found.certificate.name)
        )
        screen.say(text)
    if args.json:
        print(json.dumps({"file": str(found.file), **found.content}, ensure_ascii=False))
    return 0
