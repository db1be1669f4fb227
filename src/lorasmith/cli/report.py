"""lorasmith report: a page on one run: what it learned and forgot, whether LoRA was enough, what to try next."""

import argparse
import json
from pathlib import Path

from lorasmith.cli.flags import Parser, base_of
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.errors import ConfigError
from lorasmith.i18n import _


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Write a page about a run: what it learned and forgot, whether LoRA was enough or full fine-tuning was needed, "
        "and what to try next, with the evidence and how sure it is."
    )
    parser = Parser("report", "RUN [DATA ...]", about)
    parser.own.add_argument("run", metavar="RUN", help=_("Run or adapter folder"))
    parser.own.add_argument(
        "words", metavar="DATA", nargs="*", help=_("Evaluation data files (default: the run's held-out examples)")
    )
    parser.own.add_argument("--output", metavar="FILE", help=_("HTML file to write (default: RUN/report.html)"))
    parser.add_switch("--quick", _("Only read the run's files, without loading the base model"))
    parser.add_json()
    parser.add_base()
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the page, and print its findings. Raises LorasmithError."""
    model, target = base_of(args), _target(args)
    if args.quick and args.words:
        raise ConfigError(_("--quick does not load the base model, so it cannot evaluate {file}.", file=args.words[0]))
    with importing():
        from lorasmith.pages.pictures import require_matplotlib
        from lorasmith.pages.report import write_page
        from lorasmith.runs.report import make_report

    require_matplotlib()
    with Screen(json=args.json) as screen:
        result = make_report(args.run, args.words, model, args.quick, screen)
        file = target or result.subject.folder / "report.html"
        write_page(result, file)
        for finding in result.findings.values():
            screen.say(f"{finding.question} {finding.answer}")
        for step in result.steps:
            screen.say(_("Try next: {what}", what=step.what) + (f"\n  {step.command}" if step.command else ""))
        screen.say(_("Wrote {file}", file=file))
    if args.json:
        print(json.dumps(result.to_json() | {"page": str(file)}, ensure_ascii=False))
    return 0


def _target(args: argparse.Namespace) -> Path | None:
    """The file of --output, or None. Raises ConfigError if its folder does not exist, before minutes are spent."""
    if args.output is None:
        return None
    path = Path(args.output).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            _("--output {file}: must be a file in an existing folder, such as report.html", file=args.output)
        )
    return path
