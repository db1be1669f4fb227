"""lorasmith check: check a training before starting it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from lorasmith.cli.export import add_export
from lorasmith.cli.flags import Parser, config_of, html_path
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.toml import Config
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.i18n import _


def parser() -> Parser:
    """The options of `train`, and how the result is shown."""
    parser = Parser(
        "check",
        "DATA ...",
        _("Check a training run before starting it: base model, data, target modules, memory and time."),
    )
    parser.own.add_argument("files", metavar="DATA", nargs="*", help=_("Training data files (same as --data)"))
    parser.add_switch("--each", _("Check an adapter for each file of DATA, or of the folder DATA; see lorasmith train"))
    add_export(parser)
    parser.add_html()
    parser.add_json()
    parser.add_config()
    return parser


def run(args: argparse.Namespace) -> int:
    """Show the result; returns 0 if training can start, with or without warnings, else 2. Raises LorasmithError."""
    config, page = config_of(args), html_path(args)
    with importing():
        from lorasmith.data.dataset.by_name import files_by_name, with_names
        from lorasmith.preflight.check import check
    if args.each:
        config = with_names(config)
    if files_by_name(config.data.data):
        return _run_each(args, config, page)
    from lorasmith.cli.check_result import show

    with Screen(json=args.json) as screen:
        result = check(config, screen)
        if args.export and (problems := _export_problems(config, screen)):
            result = replace(result, problems=[*result.problems, *problems])
        show(result, screen.console, plain=screen.plain)
        if page is not None:
            from lorasmith.pages.check import write_page

            write_page(result, page)
            screen.say(_("Wrote {file}", file=page))
    if args.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    return result.exit_code


def _run_each(args: argparse.Namespace, config: Config, page: Path | None) -> int:
    """The same for several adapters: 2 if the training of any of them cannot start."""
    from lorasmith.cli.check_result import show
    from lorasmith.preflight.check import check_each

    if page is not None:
        raise ConfigError(_("--html shows one training. Give the files of one adapter, without its name."))
    with Screen(json=args.json) as screen:
        found = check_each(config, screen)
        for name, result in found.items():
            screen.say(_("Adapter {name}", name=name))
            show(result, screen.console, plain=screen.plain)
        screen.say(
            _(
                "Memory and time are those of each training alone. Trained at once, all together usually need less "
                "time and more memory."
            )
        )
    if args.json:
        print(json.dumps({name: result.to_json() for name, result in found.items()}, ensure_ascii=False))
    return max(result.exit_code for result in found.values())


def _export_problems(config: Config, screen: Screen) -> list[str]:
    """Why what is trained could not be exported."""
    from lorasmith.export.gguf.model import require_exportable

    try:
        require_exportable(config.model, screen)
    except LorasmithError as error:
        return list(error.problems)
    return []
