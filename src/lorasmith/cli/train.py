"""lorasmith train: train an adapter and evaluate it."""

import argparse
import json
from dataclasses import asdict

from lorasmith.cli.flags import Parser, config_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.errors import ConfigError
from lorasmith.i18n import _


def parser() -> Parser:
    """The arguments of the command, including a flag for every field of the configuration."""
    parser = Parser("train", "DATA ...", _("Train a LoRA adapter on your data and evaluate it on held-out examples."))
    parser.own.add_argument("files", metavar="DATA", nargs="*", help=_("Training data files (same as --data)"))
    parser.add_switch(
        "--each",
        _(
            "Train an adapter for each file of DATA, or of the folder DATA, all at once; DATA can also name them: "
            "a=FILE b=FILE"
        ),
    )
    parser.add_switch("--resume", _("Resume the run in --output"))
    parser.add_switch("--overwrite", _("Replace the run in --output"))
    parser.add_json()
    parser.add_config()
    return parser


def run(args: argparse.Namespace) -> int:
    """Train; returns 0 when the run has finished. Raises LorasmithError."""
    if args.resume and not args.config and "output" in args:
        from lorasmith.training.run_folder import resumed_config

        args.config = resumed_config(args.output)
    config = config_of(args)
    if args.resume and args.overwrite:
        raise ConfigError(_("--resume continues a run and --overwrite replaces it; give only one of them"))
    if args.resume and config.output is None:
        raise ConfigError(_("--resume: specify the run to resume with --output RUN"))
    with importing():
        from lorasmith.data.dataset.by_name import files_by_name, with_names
        from lorasmith.runs.together import train_each
        from lorasmith.runs.train import train
    if args.each:
        config = with_names(config)
    if files_by_name(config.data.data):
        with Screen(json=args.json) as screen:
            found = train_each(config, screen, resume=args.resume, overwrite=args.overwrite)
            screen.say(_("next: lorasmith chat {run}", run=next(iter(found.values())).run))
        if args.json:
            print(json.dumps({name: asdict(summary) for name, summary in found.items()}))
        return 0
    with Screen(json=args.json) as screen:
        summary = train(config, screen, resume=args.resume, overwrite=args.overwrite)
        screen.say(_("next: lorasmith chat {run}", run=summary.run))
    if args.json:
        print(json.dumps(asdict(summary)))
    return 0
