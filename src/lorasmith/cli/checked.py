"""What `check` found, on a terminal or in a pipe: facts, lengths, rows with what is learned, warnings, problems."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lorasmith.cli.screen import WIDEST, printable
from lorasmith.cli.wrap import pad, wrap
from lorasmith.i18n import _, joined

if TYPE_CHECKING:
    from lorasmith.preflight.check import Checked
    from lorasmith.preflight.lengths import Bar
    from lorasmith.preflight.rows import Piece, Shown

LONGEST_BAR = 40  # columns
LONGEST = 320  # characters of a piece; the middle of a longer one is left out ...
SPARED = 80  # ... where that spares more than one line
STYLES = {"read": "dim", "learned": "green", "stop": "bold black on green"}
MARKS = {"read": ("", ""), "learned": ("[[", "]]"), "stop": ("[[", "]]")}


def show(checked: "Checked", console: Console, plain: bool = False) -> None:
    """Everything, problems last: they are what stays in sight. plain: no colour, no bars, marks instead."""
    from lorasmith.preflight.facts import lines

    console.no_color = console.no_color or plain
    whole = not console.is_terminal  # lines in a pipe are not broken
    marked = console.no_color or whole or console.is_dumb_terminal
    block = "" if plain else "#" if console.options.ascii_only else "█"
    if checked.facts is not None:
        _table(console, list(lines(checked.facts)))
    for note in checked.notes:
        _line(console, note)
    if checked.lengths:
        _heading(console, _("Lengths in tokens"))
        _table(console, bars(checked.lengths, checked.max_length, block))
    if checked.rows:
        learned = _("text in [[ ]] is trained on") if marked else _("green text is trained on")
        stop = " ".join(checked.stop_tokens)
        _heading(console, _("Rows ({learned}; replies end with {stop})", learned=learned, stop=stop))
        for row in checked.rows:
            console.print(Text(_about(row), style="bold"), soft_wrap=whole)
            console.print(row_text(row.pieces, marked), soft_wrap=whole)
    for text in checked.warnings:
        _line(console, _("warning: {what}", what=text), "yellow")
    for text in checked.problems:
        _line(console, _("error: {problem}", problem=text), "bold red")
    _line(console, verdict(checked), style="bold")


def verdict(checked: "Checked") -> str:
    """The last line."""
    if checked.problems:
        problems = len(checked.problems)
        return (
            _("1 problem found; fix it first")
            if problems == 1
            else _("{count} problems found; fix them first", count=problems)
        )
    if checked.warnings:
        return _("ready to train; read the warnings first ({count})", count=len(checked.warnings))
    return _("ready to train")


def bars(lengths: Sequence["Bar"], max_length: int, block: str) -> list[tuple[str, str]]:
    """(range, bar of `block` and number of rows) of each bar of the histogram; what was cut is said in words."""
    most, widest = max(bar.rows for bar in lengths), len(str(lengths[-1].high))
    found = []
    for bar in lengths:
        drawn = block * max(round(LONGEST_BAR * bar.rows / most), bar.rows > 0)
        text = f"{drawn} {bar.rows:,}".strip()
        if bar.cut:
            text += " " + _("({rows} of them truncated at {length})", rows=f"{bar.cut:,}", length=f"{max_length:,}")
        ends = f"{bar.low:>{widest}}-{bar.high:<{widest}}" if bar.low < bar.high else f"{bar.low:>{widest}}"
        found.append((ends, text))
    return found


def _about(row: "Shown") -> str:
    text = _(
        "{why}, {source}: {tokens} tokens, {learned} trained on",
        why=row.why,
        source=row.source,
        tokens=row.tokens,
        learned=row.learned,
    )
    return text if row.stops else text + "; " + _("it does NOT end with a stop token, because it was truncated")


def row_text(pieces: Sequence["Piece"], marked: bool, whole: bool = False) -> Text:
    """A row in colours, or with marks; `whole`: long pieces too, and control characters as they are."""
    text, shown = Text(), (lambda piece: piece.text) if whole else _shortened
    for number, piece in enumerate(pieces):
        if marked:
            # a stop token belongs to the answer before it, so both stand between one pair of marks
            before = number > 0 and pieces[number - 1].kind == "learned"
            after = number + 1 < len(pieces) and pieces[number + 1].kind == "stop"
            begin, end = MARKS[piece.kind]
            begin, end = ("" if piece.kind == "stop" and before else begin), ("" if after and begin else end)
            text.append(begin + shown(piece) + end)
        else:
            text.append(shown(piece), STYLES[piece.kind])
    return text


def _shortened(piece: "Piece") -> str:
    text = printable(piece.text)
    left_out, half = len(text) - LONGEST, LONGEST // 2
    if left_out <= SPARED:
        return text
    return text[:half] + _(" ... {count} characters omitted ... ", count=f"{left_out:,}") + text[-half:]


def _table(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Labels and texts in two columns, the text wrapped within its own; a line each in a pipe."""
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
