"""Show the result of `lorasmith check` on a terminal or in a pipe: facts, lengths, rows, warnings and problems."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lorasmith.cli.screen import WIDEST, printable
from lorasmith.cli.wrap import pad, wrap
from lorasmith.i18n import _, counted, joined

if TYPE_CHECKING:
    from lorasmith.preflight.check import CheckResult
    from lorasmith.preflight.lengths import Bar
    from lorasmith.preflight.rows import RowPreview, TextSpan

LONGEST_BAR = 40  # columns
LONGEST = 320  # characters of a span; the middle of a longer one is omitted ...
SPARED = 80  # ... if that saves more than one line
STYLES = {"read": "dim", "learned": "green", "stop": "bold black on green"}
MARKS = {"read": ("", ""), "learned": ("[[", "]]"), "stop": ("[[", "]]")}


def show(result: "CheckResult", console: Console, plain: bool = False) -> None:
    """Show everything, problems last so that they stay in view. plain: no colors and no bars, marks instead."""
    from lorasmith.preflight.facts import labeled_facts

    console.no_color = console.no_color or plain
    whole = not console.is_terminal  # lines in a pipe are not wrapped
    marked = console.no_color or whole or console.is_dumb_terminal
    block = "" if plain else "#" if console.options.ascii_only else "█"
    if result.facts is not None:
        _table(console, list(labeled_facts(result.facts)))
    for note in result.notes:
        _line(console, note)
    if result.lengths:
        _heading(console, _("Lengths in tokens"))
        _table(console, histogram_lines(result.lengths, result.max_length, block))
    if result.rows:
        learned = _("text in [[ ]] is trained on") if marked else _("green text is trained on")
        stop = " ".join(result.stop_tokens)
        _heading(console, _("Rows ({learned}; replies end with {stop})", learned=learned, stop=stop))
        for row in result.rows:
            console.print(Text(_about(row), style="bold"), soft_wrap=whole)
            console.print(row_text(row.pieces, marked), soft_wrap=whole)
    for text in result.warnings:
        _line(console, _("warning: {what}", what=text), "yellow")
    for text in result.problems:
        _line(console, _("error: {problem}", problem=text), "bold red")
    _line(console, verdict(result), style="bold")


def verdict(result: "CheckResult") -> str:
    """The last line: whether training can start."""
    if result.problems:
        one, many = _("1 problem found; fix it first"), _("{count} problems found; fix them first")
        return counted(len(result.problems), one, many)
    if result.warnings:
        return _("ready to train; read the warnings first ({count})", count=len(result.warnings))
    return _("ready to train")


def histogram_lines(lengths: Sequence["Bar"], max_length: int, block: str) -> list[tuple[str, str]]:
    """(range, bar and number of rows) for each bar of the histogram. block: character of the bars, "" for none."""
    most, widest = max(bar.rows for bar in lengths), len(str(lengths[-1].high))
    found = []
    for bar in lengths:
        blocks = block * max(round(LONGEST_BAR * bar.rows / most), bar.rows > 0)
        text = f"{blocks} {bar.rows:,}".strip()
        if bar.cut:
            text += " " + _("({rows} of them truncated at {length})", rows=f"{bar.cut:,}", length=f"{max_length:,}")
        ends = f"{bar.low:>{widest}}-{bar.high:<{widest}}" if bar.low < bar.high else f"{bar.low:>{widest}}"
        found.append((ends, text))
    return found


def _about(row: "RowPreview") -> str:
    text = _(
        "{why}, {source}: {tokens} tokens, {learned} trained on",
        why=row.why,
        source=row.source,
        tokens=row.tokens,
        learned=row.learned,
    )
    return text if row.stops else text + "; " + _("it does NOT end with a stop token, because it was truncated")


def row_text(spans: Sequence["TextSpan"], marked: bool, whole: bool = False) -> Text:
    """A row in colors, or with marks.

    whole: long spans are not shortened, and control characters are kept.
    """
    text, shown = Text(), (lambda span: span.text) if whole else _shortened
    for number, span in enumerate(spans):
        if marked:
            # a stop token belongs to the answer before it, so one pair of marks encloses both
            before = number > 0 and spans[number - 1].kind == "learned"
            after = number + 1 < len(spans) and spans[number + 1].kind == "stop"
            begin, end = MARKS[span.kind]
            begin, end = ("" if span.kind == "stop" and before else begin), ("" if after and begin else end)
            text.append(begin + shown(span) + end)
        else:
            text.append(shown(span), STYLES[span.kind])
    return text


def _shortened(span: "TextSpan") -> str:
    text = printable(span.text)
    left_out, half = len(text) - LONGEST, LONGEST // 2
    if left_out <= SPARED:
        return text
    return text[:half] + _(" ... {count} characters omitted ... ", count=f"{left_out:,}") + text[-half:]


def _table(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Labels and texts in two columns, with the text wrapped in its own; in a pipe, one line each."""
    widest = max(cell_len(label) for label, _text in rows) + 2
    for label, text in rows:
        lines = wrap(printable(text), min(console.width, WIDEST) - widest) if console.is_terminal else [printable(text)]
        for line in lines:
            console.print(Text.assemble((pad(label, widest), "cyan"), line), soft_wrap=True)
            label = ""


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _line(console: Console, text: str, style: str = "") -> None:
    shown = joined(printable(text))
    lines = wrap(shown, console.width) if console.is_terminal else [shown]
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)
