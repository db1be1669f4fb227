"""lorasmith merge: merge an adapter into its base model."""

import argparse
import json
from dataclasses import asdict

from lorasmith.cli.flags import Parser, base_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.i18n import _


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Merge an adapter into its base model and write a plain transformers folder, after checking that its "
        "logits match the adapter's."
    )
    parser = Parser("merge", "RUN --output DIR", about)
    parser.own.add_argument("run", metavar="RUN", help=_("Run or adapter folder"))
    parser.own.add_argument("--output", metavar="DIR", required=True, help=_("Folder for the merged model"))
    parser.own.add_argument(
        "--data", metavar="FILE", help=_("Also compare the held-out loss before and after merging, on these rows")
    )
    parser.add_switch("--overwrite", _("Replace the contents of --output"))
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Merge and check the result. Raises LorasmithError."""
    model = base_of(args)
    with importing():
        from lorasmith.adapters.merge import merge_run
        from lorasmith.runs.merging_cost import merging_cost

    with Screen(json=args.json) as screen:
        certificate = merge_run(args.run, args.output, model, args.overwrite, screen)
        screen.say(_("Merged model: {folder}", folder=certificate.folder))
        cost = merging_cost(args.run, certificate, args.data, model, screen) if args.data else None
    if args.json:
        print(json.dumps(asdict(certificate) | ({} if cost is None else {"loss": asdict(cost)})))
    return 0
