"""lorasmith init: write a commented configuration, from the data or from a configuration of another program."""

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
    parser.own.add_argument("--from", dest="source", metavar="FILE",
                            help=_("Convert a configuration of LLaMA-Factory, Axolotl, ms-swift, TRL or mlx-lm (YAML, "
                                   "JSON, or a shell script with its command) instead of suggesting values; data and "
                                   "options on the command line override it"))  # fmt: skip
    parser.add_switch("--overwrite", _("Replace an existing file"))
    parser.add_json()
    parser.add_section("model")
    parser.add_section("data")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert the file of --from, or summarize the data and show suggestions; write the file. Raises LorasmithError."""
    target = Path(args.file).expanduser()
    _refuse(target, args.overwrite)
    with Screen(json=args.json) as screen:
        result = _convert(args, target, screen) if args.source else _suggest(args, target, screen)
    if args.json:
        print(json.dumps({"file": str(target), **result}, ensure_ascii=False))
    return 0


def _suggest(args: argparse.Namespace, target: Path, screen: Screen) -> dict[str, object]:
    """Write a configuration with values suggested from the data. Returns the result for --json."""
    config = load_config(None, given(args))
    with importing():
        from lorasmith.preflight.suggest import suggest

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
    return {"reasons": suggestion.reasons, **asdict(suggestion.summary)}


def _convert(args: argparse.Namespace, target: Path, screen: Screen) -> dict[str, object]:
    """Write a configuration that was converted from the file of --from. Returns the result for --json."""
    from lorasmith.config.migrate.convert import convert, converted_toml
    from lorasmith.system.writing import write_file

    config, migration = convert(Path(args.source).expanduser(), given(args))
    head, *lines = migration.head()
    screen.say(head)
    for line in lines:
        screen.say(f"  {line}")
    write_file(target, converted_toml(config, migration), is_run=False)
    screen.say(_("Wrote {file}. Every key is listed with a comment that says which key it is from.", file=target))
    screen.say(_("next: lorasmith check --config {file}", file=shlex.quote(str(target))))
    return {
        "program": migration.program,
        "taken_over": migration.comments,
        "not_taken_over": migration.unmatched,
        "not_needed": migration.no_effect,
        "off": migration.off,
    }


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
