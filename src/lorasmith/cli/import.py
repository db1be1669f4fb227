"""lorasmith import: make an adapter of another program one of ours, with the encoding of its training."""

import argparse
import json
from dataclasses import asdict

from lorasmith.cli.flags import Parser, base_of, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.data import DataConfig
from lorasmith.config.values import check
from lorasmith.i18n import _


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Import an adapter that LLaMA-Factory, Axolotl, Unsloth, ms-swift, TRL, mlx-lm or PEFT wrote, with the chat "
        "template and system message that it was trained with."
    )
    parser = Parser("import", "FOLDER --output DIR", about)
    parser.own.add_argument("folder", metavar="FOLDER", help=_("Output folder of the other program"))
    parser.own.add_argument("--output", metavar="DIR", required=True, help=_("Folder for the adapter"))
    parser.add_switch("--overwrite", _("Replace the contents of --output"))
    parser.add_json()
    parser.add_section("data", ("template", "template_kwargs", "system"))
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Import the adapter and say what was found. Raises LorasmithError."""
    model, data = base_of(args), check(DataConfig, given(args).get("data", {}), "data")
    with importing():
        from lorasmith.adapters.imported import import_adapter

    with Screen(json=args.json) as screen:
        found = import_adapter(args.folder, args.output, data, model, args.overwrite, screen)
        rows = (
            (_("written by"), f"{found.program} ({found.source})"),
            (_("base model"), found.base),
            (_("template"), f"{found.template} ({found.template_from})"),
            (_("system message"), f"{found.system or _('none')} ({found.system_from or _('not recorded')})"),
        )
        for label, text in rows:
            screen.say(f"{label}: {text}")
        screen.say(_("Imported adapter: {folder}; read again, its logits differ by {error:.1e}",
                     folder=found.folder, error=found.error))  # fmt: skip
        if found.unlike:
            screen.warn(
                _(
                    "{program} trained with its own template {name}, which may differ from this one, also in its "
                    "default system message. If it does, import again with --template FILE.jinja or --system TEXT.",
                    program=found.program,
                    name=found.unlike,
                )
            )
        if not found.system_from:
            screen.warn(
                _(
                    "{program} does not record the system message of a training. If there was one that is not part of "
                    "the template, import again with --system TEXT.",
                    program=found.program,
                )
            )
    if args.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
    return 0
