"""Lines no wider than a terminal, in its cells: a Chinese character takes two, and a line may break beside it."""

import argparse
import re

from rich.cells import cell_len

WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff01-\uff60"
OPENING, CLOSING = "（《「『“‘", "，。：；！？、）》」』”’"  # never at the end, never at the start of a line
LABEL = re.compile(r" *(?:\S+ {2,})?")  # what a further line of a paragraph stands behind
PIECE = re.compile(rf"\s*[{OPENING}]*(?:[{WIDE}]|[^\s{WIDE}{OPENING}{CLOSING}]+)?[{CLOSING}]*")


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """`text` in lines of at most `width` cells, broken at spaces and beside Chinese; `indent` begins further lines.

    A longer word, such as a path, stays whole: the terminal breaks it, and it can still be copied.
    """
    return [line for paragraph in text.split("\n") for line in _paragraph(paragraph, width, indent)]


def hang(text: str, width: int) -> list[str]:
    """As `wrap`; the further lines of a paragraph such as `label   text` stand under its text, not under its label."""
    found = []
    for paragraph in text.split("\n"):
        label = LABEL.match(paragraph)
        found += wrap(paragraph, width, " " * cell_len(label[0]) if label else "")
    return found


def pad(text: str, cells: int) -> str:
    """`text` with spaces behind it, as wide as `cells`."""
    return text + " " * (cells - cell_len(text))


def _paragraph(text: str, width: int, indent: str) -> list[str]:
    lines, line = [], ""
    for piece in filter(None, PIECE.findall(text.rstrip())):
        if line and cell_len(line + piece) > width:
            lines.append(line)
            line = indent + piece.lstrip()
        else:
            line += piece
    return [*lines, line]


class HelpFormatter(argparse.HelpFormatter):
    """argparse's own, which counts characters and breaks at spaces only, with our lines."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in wrap(" ".join(text.split()), width - len(indent)))
