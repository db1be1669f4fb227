"""lorasmith eval: compare adapters with their base model on held-out examples."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.cli.flags import Parser, base_of, given, html_path, positive
from lorasmith.cli.importing import importing
from lorasmith.cli.screen import Screen
from lorasmith.config.data import DataConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.values import check
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.evaluation.results import Evaluation, ResultGroup

ADAPTER_FILES = ("adapter_config.json", "adapter/adapter_config.json", "config.toml")  # one of them is in every RUN
ANSWERS_SHOWN = 5  # prompts whose answers are shown on a terminal


def parser() -> Parser:
    """The options: adapters, examples, and what to evaluate besides the loss."""
    about = _(
        "Compare adapters with their base model: held-out loss, generated answers and forgetting, each with a "
        "paired confidence interval."
    )
    parser = Parser("eval", "RUN [RUN ...] [DATA ...]", about)
    parser.own.add_argument(
        "run", metavar="RUN", help=_("Run or adapter folder; give several to compare them in one table")
    )
    parser.own.add_argument(
        "words", metavar="DATA", nargs="*", help=_("Evaluation data files (default: the run's held-out examples)")
    )
    parser.own.add_argument(
        "--generate", metavar="N", type=positive,
        help=_("Also generate answers to N examples and score them: exact match, F1, chrF, BLEU, ROUGE-L"),
    )  # fmt: skip
    parser.own.add_argument(
        "--metric", metavar="FILE.py:FUNCTION", action="append", default=[],
        help=_("Custom metric for the answers: a function (prediction, reference) -> number, higher is better; "
                "can be repeated"),
    )  # fmt: skip
    parser.own.add_argument(
        "--forget", metavar="FILE", nargs="?", const="",
        help=_("Also compute the loss on this file to detect forgetting; without FILE, on a small general text"),
    )  # fmt: skip
    parser.add_html()
    parser.add_json()
    parser.add_base()
    parser.add_section(
        "data", only=("max_length", "too_long", "map", "fill", "roles", "skip_bad_rows")
    )  # the template is the adapter's own
    parser.add_section("sampling")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print every metric of base model and adapters, and the interval of their difference. Raises LorasmithError."""
    model, limits, page = base_of(args), _limits(args), html_path(args)
    sampling = check(SamplingConfig, given(args).get("sampling", {}), "sampling")
    runs = [args.run, *filter(is_adapter, args.words)]
    files = tuple(word for word in args.words if not is_adapter(word))
    with importing():
        from lorasmith.pages.evaluation import write_page
        from lorasmith.runs.evaluate import EvaluationOptions, evaluate

    options = EvaluationOptions(files, limits, args.generate or 0, sampling, tuple(args.metric), args.forget)
    with Screen(json=args.json) as screen:
        result = evaluate(runs, options, model, screen)
        show(result, screen)
        if page is not None:
            write_page(result, [Path(run).expanduser() for run in runs], page)
            screen.say(_("Wrote {file}", file=page))
    if args.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    return 0


def is_adapter(word: str) -> bool:
    """Whether an argument is a run or adapter folder; if not, it is a data file."""
    return any((Path(word).expanduser() / name).is_file() for name in ADAPTER_FILES)


def show(result: "Evaluation", screen: Screen) -> None:
    """Show the loss of a single adapter as a sentence, anything more as a table with verdicts, and some answers."""
    if len(result.adapters) == 1 and not result.samples and result.forget_data is None:
        screen.say(str(result.adapters[0].loss))
        return
    headings = ["", _("value"), _("difference"), _("95% CI"), _("significant?")]
    screen.table(headings, [table_rows(group) for group in result.groups()])
    for text in result.verdicts():
        screen.say(text)
    if result.samples:
        rows = [
            (sample.prompt, sample.reference, *(answer.text for answer in sample.answers))
            for sample in result.samples[:ANSWERS_SHOWN]
        ]
        screen.side_by_side(rows, _("reference answer"), *result.names)
    if len(result.samples) > ANSWERS_SHOWN:
        screen.say(
            _(
                "answers not shown: {more}; use --html or --json to see them all",
                more=len(result.samples) - ANSWERS_SHOWN,
            )
        )


def table_rows(group: "ResultGroup") -> list[list[str]]:
    """The table rows of one metric: the base model's value, and the adapters below it."""
    base, *adapters = group.lines
    first = [_("{measure} (base)", measure=group.name), base.value, "", "", ""]
    return [
        first,
        *([f"  {line.who}", line.value, line.difference, line.interval, line.significance] for line in adapters),
    ]


def _limits(args: argparse.Namespace) -> DataConfig | None:
    """--max-length, --too-long and --map; None if none of them is given."""
    found: dict[str, Any] = given(args).get("data", {})
    return check(DataConfig, found, "data") if found else None
