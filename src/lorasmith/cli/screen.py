"""Output on a terminal, with live progress bars, tables and curves; or to a pipe, as plain lines."""

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from lorasmith.cli.curve import curve, curve_in_words
from lorasmith.cli.wrap import hang, wrap
from lorasmith.i18n import _, foreign, joined
from lorasmith.report import Report

WIDEST = 120  # columns of a table or curve; wider ones are hard to read
LINE_PART, LINE_PAUSE = 0.05, 1.0  # print a plain line after this fraction of a task, at most one per so many seconds,
LINE_SECONDS = 10.0  # and at least one per so many seconds
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Console(Console):
    """rich's console exits the process on a broken pipe; this one raises, so that cli/main.py decides."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Screen(Report):
    """The report for the command line; use it as a context manager.

    json: write to standard error, so that standard output contains only the JSON line.
    clock: returns seconds; a test replaces it.
    """

    def __init__(
        self, json: bool = False, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plain = bool(os.environ.get("LORASMITH_PLAIN"))  # set by --plain or by the user
        self.console = _Console(
            file=file or (sys.stderr if json else sys.stdout),
            highlight=False,
            emoji=False,
            force_terminal=False if self.plain else None,
        )
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, tuple[int, float]] = {}  # task -> done and time of its last plain line
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def say(self, text: str) -> None:
        """Print a message; wrapped at words on a terminal, one line in a pipe."""
        self._print(joined(printable(text)))

    def warn(self, text: str) -> None:
        """Print a message marked as a warning."""
        self._print(joined(_("warning: {what}", what=printable(text))), "yellow")

    def fail(self, text: str) -> None:
        """Print a message marked as an error."""
        self._print(joined(_("error: {problem}", problem=printable(text))), "bold red")

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """Advance the task's bar, or print a line now and then; a task that is done leaves one line."""
        parts = [number(name, value) for name, value in numbers.items()]
        if self.live and done < total:
            self._move(task, done, total, parts)
        elif done >= total or (not self.live and self._due(task, done, total)):
            self._print("  ".join([f"{task} {done:,}/{total:,}", *parts]))
        if done >= total:
            self._lines.pop(task, None)
            self._end(task)

    def curve(self, points: Sequence[tuple[int, float]], title: str) -> None:
        """Print a small plot of (step, value) under a title, or a description in words with --plain."""
        if self.plain:
            for line in curve_in_words(points, title):
                self._print(line)
            return
        ascii_only = self.console.options.ascii_only
        self._print(title, "bold")
        self._print(curve(points, min(self.console.width, WIDEST) - 1, plain=ascii_only))

    def side_by_side(self, rows: Sequence[Sequence[str]], *headings: str) -> None:
        """Print rows of (prompt, reply, reply, ...): each prompt on a line, with its replies in columns below."""
        for prompt, *replies in rows:
            self._print("> " + printable(prompt), "bold")
            shown = [printable(reply).strip() or _("(empty)") for reply in replies]
            if self.plain:
                self._facts(headings, shown)
                continue
            table = self._table()
            for heading in headings:
                table.add_column(Text(printable(heading), style="dim"), ratio=1, overflow="fold")
            room = min(self.console.width, WIDEST) // len(shown) - 3  # rich does not break lines at Chinese punctuation
            table.add_row(*(Text("\n".join(wrap(reply, room))) for reply in shown))
            self.console.print(table)

    def table(self, headings: Sequence[str], groups: Sequence[Sequence[Sequence[str]]]) -> None:
        """Print a table of groups of rows, the first row of each group in bold."""
        if self.plain:
            for row in (row for group in groups for row in group):
                self._facts(headings, [printable(cell) for cell in row])
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading in headings:
            table.add_column(Text(printable(heading), style="dim"), overflow="fold")
        for group in groups:
            for row in group:
                table.add_row(*(Text(printable(cell)) for cell in row), style="bold" if row is group[0] else "")
        self.console.print(table)

    def _facts(self, headings: Sequence[str], row: Sequence[str]) -> None:
        """Print a row of a table as one `heading: cell` per line."""
        for heading, cell in zip(headings, row, strict=True):
            self._print(f"{printable(heading)}: {cell}" if heading else cell)

    def _table(self) -> Table:
        width = min(self.console.width, WIDEST)
        return Table(box=box.MINIMAL, width=width, padding=(0, 1), pad_edge=False, show_edge=False)

    def _print(self, text: str, style: str = "") -> None:
        lines = hang(text, self.console.width) if self.live else [text]
        self.console.print(Text("\n".join(lines), style=style), soft_wrap=True)

    def _move(self, task: str, done: int, total: int, parts: list[str]) -> None:
        """Move the bar; numbers that do not fit beside it are left out, starting with the last."""
        if self._bars is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
            count = TextColumn("{task.fields[count]}", markup=False)
            self._bars = Progress(
                *columns, count, console=self.console, transient=True, expand=True, refresh_per_second=4
            )
            self._bars.start()
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, count="")
        shown = [f"{done:,}/{total:,}", *parts]
        while len(shown) > 1 and cell_len(task) + cell_len("  ".join(shown)) + 12 > self.console.width:
            shown.pop()
        self._bars.update(self._tasks[task], completed=done, total=total, count="  ".join(shown))

    def _due(self, task: str, done: int, total: int) -> bool:
        """Whether it is time for the task's next plain line."""
        now = self._clock()
        last, then = self._lines.get(task, (-total, now - LINE_PAUSE))
        due = now - then >= (LINE_PAUSE if done - last >= total * LINE_PART else LINE_SECONDS)
        if due:
            self._lines[task] = (done, now)
        return due

    def _end(self, task: str) -> None:
        if self._bars is not None and task in self._tasks:
            self._bars.remove_task(self._tasks.pop(task))
        if not self._tasks:
            self._stop()

    def _stop(self) -> None:
        """Stop redrawing and show the cursor again."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()


def number(name: str, value: float) -> str:
    """A named number of a progress line, with its unit."""
    if name == "loss":
        return _("loss {value:.3f}", value=value)
    if name == "tokens_per_second":
        return _("{value:,.0f} tokens/s", value=value)
    if name == "rewards/accuracies":
        return _("accuracy {value:.0%}", value=value)
    if name == "rewards/margins":
        return _("margin {value:+.3f}", value=value)
    if name == "seconds_left":
        return _("{clock} left", clock=clock(value))
    if name == "memory_mib":
        return _("{value:,.0f} MiB", value=value)
    return f"{foreign(name.replace('_', ' '))} {value:.4g}"


def clock(seconds: float) -> str:
    """A duration as 0:07, 12:30 or 3:05:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def printable(text: str) -> str:
    """The text without control characters other than newline and tab, so that a reply cannot control the terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
