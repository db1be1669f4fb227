"""lorasmith init: write a commented configuration with values suggested from the data."""

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from lorasmith.cli.flags import Parser, given
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.toml import load_config
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, counted

FILE = "lorasmith.toml"


def parser() -> Parser:
    """The options: data and base model, which are written into the file, and the file itself."""
    about = _(
        "Write a commented configuration for `lorasmith train --config`, with values suggested from your data. "
        "Nothing is trained."
    )
    parser = Parser("init", "DATA ...", about)
    parser.own.add_argument("files", metavar="DATA", nargs="*", help=_("Training data files (same as --data)"))
    parser.own.add_argument("--output", dest="file", metavar="FILE", default=FILE,
                            help=_("File to write (default: {name})", name=FILE))  # fmt: skip
    parser.add_switch("--overwrite", _("Replace an existing file"))
    parser.add_json()
    parser.add_section("model")
    parser.add_section("data")
    return parser


def run(args: argparse.Namespace) -> int:
    """Summarize the data, show the suggestions, write the file. Raises LorasmithError."""
    config, target = load_config(None, given(args)), Path(args.file).expanduser()
    _refuse(target, args.overwrite)
    with importing():
        from lorasmith.preflight.suggest import suggest

    with Screen(json=args.json) as screen:
        if "model" not in config.model.model_fields_set:
            screen.say(_("No base model given; using {model}, as in the demo. Choose another one with --model.",
                         model=config.model.model))  # fmt: skip
        suggestion = suggest(config, screen)
        screen.say(str(suggestion.summary))
        for key, why in suggestion.reasons.items():
            section, _dot, name = key.partition(".")
            value = getattr(getattr(suggestion.config, section), name)
            if name == "samples":
                value = counted(len(value), _("1 prompt"), _("{count} prompts"))
            screen.say(f"  {name:<14}{f'{value:g}' if isinstance(value, float) else value}: {why}")
        suggestion.write(target)
        screen.say(_("Wrote {file}. Every key is listed with a comment; edit it as you like.", file=target))
        screen.say(_("next: lorasmith train --config {file}", file=shlex.quote(str(target))))
    if args.json:
        print(
            json.dumps(
                {"file": str(target), "reasons": suggestion.reasons, **asdict(suggestion.summary)}, ensure_ascii=False
            )
        )
    return 0


def _refuse(target: Path, overwrite: bool) -> None:
    """Raise ConfigError if the file could not be written, before any data is read."""
    if target.is_dir():
        raise ConfigError(_("--output: {file} is a folder; name a file in it.", file=target))
    if target.exists() and not overwrite:
        raise ConfigError(
            _("{file} already exists. Replace it with --overwrite, or choose another --output.", file=target)
        )
    if not target.absolute().parent.is_dir():
        raise ConfigError(_("--output: the folder {folder} does not exist. Create it first.", folder=target.parent))
