"""lorasmith list: the runs in a folder, newest first."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lorasmith.cli.flags import Parser
from lorasmith.cli.screen import WIDEST, Screen, printable
from lorasmith.i18n import _

if TYPE_CHECKING:
    from lorasmith.runs.listing import RunInfo

FOLDER = "runs"
OTHER_COLUMNS = 57  # minimum width of all columns but the run's name


def parser() -> Parser:
    """The arguments of the command."""
    about = _(
        "List the runs in a folder with their state, data, losses and size. Only reads their files; no model is loaded."
    )
    parser = Parser("list", "[FOLDER]", about)
    parser.own.add_argument(
        "folder", metavar="FOLDER", nargs="?", help=_("Folder that contains the runs (default: runs)")
    )
    parser.add_json()
    return parser


def run(args: argparse.Namespace) -> int:
    """Print a table of runs. Raises LorasmithError."""
    from lorasmith.runs.listing import find_runs

    folder = Path(args.folder or FOLDER).expanduser()
    found = find_runs(folder) if args.folder or folder.is_dir() else []
    with Screen(json=args.json) as screen:
        if found and screen.plain:
            screen.table(_headings(), [[_cells(info)] for info in found])
        elif found:
            screen.console.print(table(found, min(screen.console.width, WIDEST)))
        else:
            screen.say(_("No runs in {folder}. Start one with: lorasmith train DATA", folder=folder))
        for info in found:
            if info.state == "broken":
                screen.warn(info.problem)
        stopped = next((info for info in found if info.state == "interrupted"), None)
        if stopped:
            screen.say(_("resume: lorasmith train --output {run} --resume", run=stopped.run))
    if args.json:
        runs = [asdict(info) for info in found]
        print(json.dumps({"folder": str(folder), "runs": runs}, ensure_ascii=False))
    return 0


def table(runs: Sequence["RunInfo"], width: int) -> Table:
    """A table of runs that fits `width` columns. Names of runs may wrap but are never cut, because users type them."""
    made = Table(box=None, width=width, padding=(0, 1, 0, 0), pad_edge=False)
    name, base, data = (max(map(cell_len, shown)) for shown in zip(*map(_names, runs), strict=True))
    run, state, step, on, rows, loss, size, date = _headings()
    made.add_column(run, width=min(name, max(width - OTHER_COLUMNS, 10)), overflow="fold")
    made.add_column(state, no_wrap=True)
    made.add_column(step, justify="right", no_wrap=True)
    made.add_column(on, ratio=base, no_wrap=True, overflow="ellipsis")
    made.add_column(rows, ratio=data, no_wrap=True, overflow="ellipsis")
    made.add_column(loss, justify="right", no_wrap=True)
    made.add_column(size, justify="right", no_wrap=True)
    made.add_column(date, no_wrap=True)
    for info in runs:
        made.add_row(*(Text(printable(cell)) for cell in _cells(info)))
    return made


def _cells(info: "RunInfo") -> tuple[str, ...]:
    run, base, data = _names(info)
    size = "-" if info.adapter_bytes is None else f"{info.adapter_bytes / 1e6:.1f}"
    date = _date(datetime.fromisoformat(info.date))
    return run, _states()[info.state], f"{info.step:,}", base, data, _losses(info), size, date


def _headings() -> tuple[str, ...]:
    return _("run"), _("state"), _("step"), _("base"), _("data"), _("held-out loss"), "MB", _("date")


def _names(info: "RunInfo") -> tuple[str, str, str]:
    """The names of the run, its base model and its data in the table."""
    return Path(info.run).name, Path(info.base).name, _data(info.data)


def _states() -> dict[str, str]:
    return {
        "finished": _("finished"),
        "running": _("running"),
        "interrupted": _("stopped"),
        "broken": _("broken"),
    }


def _data(files: Sequence[str]) -> str:
    first = Path(files[0]).name if files else "-"
    return first if len(files) < 2 else f"{first} +{len(files) - 1}"


def _losses(info: "RunInfo") -> str:
    before, after = ("-" if loss is None else f"{loss:.3f}" for loss in (info.loss_before, info.loss_after))
    return f"{before} -> {after}" if (before, after) != ("-", "-") else "-"


def _date(date: datetime) -> str:
    """The time if it is today, else the month and day, or for older dates the year and month; digits only."""
    now = datetime.now().astimezone()
    if date.date() == now.date():
        return f"{date:%H:%M}"
    return f"{date:%m-%d}" if now - date < timedelta(days=300) else f"{date:%Y-%m}"
