"""lorasmith study: train every combination of a grid of options and compare the results."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.cli.flags import Parser, positive
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.study import load_study
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.config.study import Study
    from lorasmith.runs.study.result import Setting, StudyResult


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "Train every combination of the options listed under [study.grid] of a TOML file, and compare the runs: "
        "held-out loss, forgetting, time and memory, with confidence intervals."
    )
    parser = Parser("study", "STUDY.toml", about)
    parser.own.add_argument(
        "file", metavar="STUDY.toml",
        help=_('TOML file: a configuration, and lists of values such as "lora.r" = [1, 8, 64] under [study.grid]'),
    )  # fmt: skip
    parser.own.add_argument(
        "--output", metavar="TEXT", help=_("Folder of the study (default: output in the file, or runs/NAME)")
    )
    parser.add_switch("--dry-run", _("Only show the runs and how long they will take"))
    parser.own.add_argument(
        "--parallel", metavar="N", type=positive, default=1,
        help=_("Train N runs at once, each in a process with its share of the cores, where cores and memory allow it"),
    )  # fmt: skip
    parser.own.add_argument(
        "--at-once", metavar="N", type=positive, default=1,
        help=_(
            "Train up to N adapters in the same steps over one base model, which is faster with short rows; each is "
            "the same as alone up to rounding"
        ),
    )  # fmt: skip
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Train what has not been trained yet, show the table, write the page. Raises LorasmithError, Interrupted.

    With --dry-run, returns 2 if a run could not be trained.
    """
    study = load_study(Path(args.file).expanduser(), args.output)
    with importing():
        from lorasmith.pages.study import write_page
        from lorasmith.runs.study.folder import PAGE
        from lorasmith.runs.study.run import run_study

    with Screen(json=args.json) as screen:
        if args.dry_run:
            return _dry_run(study, screen, args.json)
        page = study.folder / PAGE
        result = run_study(study, screen, lambda result: write_page(result, page), args.parallel, args.at_once)
        show(result, screen)
        screen.say(_("Wrote {file}", file=page))
    if args.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    return 0


def show(result: "StudyResult", screen: Screen) -> None:
    """The table of all settings, best first within each group, and the findings in words."""
    from lorasmith.runs.study.findings import findings

    headings = [_("setting"), _("loss"), _("difference"), _("95% CI"), _("forgetting"), _("time"), _("MiB")]
    groups = [[_row(setting) for setting in curve.settings] for curve in result.curves]
    screen.table(headings, groups)
    for text in findings(result):
        screen.say(text)


def _row(setting: "Setting") -> list[str]:
    from lorasmith.preflight.estimate import duration

    compared = setting.from_best
    seconds, memory = setting.mean_of("seconds"), setting.mean_of("peak_memory_mib")
    loss = f"{setting.mean:.4f}" if math.isfinite(setting.mean) else _("failed") if setting.failed else "-"
    return [
        setting.name,
        loss,
        f"{compared.difference:+.4f}" if compared else "",
        f"{compared.examples.low:+.4f} {compared.examples.high:+.4f}" if compared else "",
        "" if setting.forgetting is None else f"{setting.forgetting:+.3f}",
        "" if seconds is None else duration(seconds),
        "" if memory is None else f"{memory:,.0f}",
    ]


def _dry_run(study: "Study", screen: Screen, as_json: bool) -> int:
    from lorasmith.preflight.estimate import duration
    from lorasmith.runs.study.forecast import forecast
    from lorasmith.runs.study.repeats import runs_of

    expected = forecast(study, screen)
    rows = [
        [one.cell.name, _("finished") if one.is_finished else "" if one.seconds is None else duration(one.seconds)]
        for one in expected
    ]
    screen.table([_("run"), _("time")], [[row] for row in rows])
    known = [one.seconds for one in expected if one.seconds is not None and not one.is_finished]
    count = runs_of(study).total  # with those that depend on results
    left = count - sum(one.is_finished for one in expected)
    total = duration(left * sum(known) / len(known)) if known else "?"
    screen.say(_("{runs} runs, {left} of them to train: about {time}", runs=count, left=left, time=total))
    problems = dict.fromkeys(f"{one.cell.name}: {text}" for one in expected for text in one.problems)
    for text in problems:
        screen.fail(text)
    if as_json:
        runs = [
            {
                "name": one.cell.name,
                "seconds": one.seconds,
                "finished": one.is_finished,
                "problems": list(one.problems),
            }
            for one in expected
        ]
        print(json.dumps({"runs": runs}))
    return 2 if problems else 0
