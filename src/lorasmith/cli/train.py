"""lorasmith train: train an adapter and evaluate it."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lorasmith.cli.export import add_export, export, place_of
from lorasmith.cli.flags import Parser, config_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config
from lorasmith.errors import ConfigError, RunError
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
    add_export(parser)
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
        if args.export:
            raise ConfigError(_("--export exports one adapter. Export each after the training: lorasmith export RUN"))
        with Screen(json=args.json) as screen:
            found = train_each(config, screen, resume=args.resume, overwrite=args.overwrite)
            screen.say(_("next: lorasmith chat {run}", run=next(iter(found.values())).run))
        if args.json:
            print(json.dumps({name: asdict(summary) for name, summary in found.items()}))
        return 0
    with Screen(json=args.json) as screen:
        if args.export:
            _require_export(args, config, screen)
        summary = train(config, screen, resume=args.resume, overwrite=args.overwrite)
        if args.export:
            place = place_of(args.export, summary.run)
            base = ModelConfig(trust_remote_code=config.model.trust_remote_code)
            export(summary.run, place, args.export, "f16", base, args.overwrite, screen)
        screen.say(_("next: lorasmith chat {run}", run=summary.run))
    if args.json:
        print(json.dumps(asdict(summary)))
    return 0


def _require_export(args: argparse.Namespace, config: Config, screen: Screen) -> None:
    """Refuse before the training what could not be exported after it."""
    from lorasmith.export.gguf.model import require_exportable

    require_exportable(config.model, screen)
    if config.output and not args.overwrite and Path(place_of(args.export, config.output)).expanduser().exists():
        text = _("{file} already exists. Choose another --output, or replace it with --overwrite.",
                 file=place_of(args.export, config.output))  # fmt: skip
        raise RunError(text)
