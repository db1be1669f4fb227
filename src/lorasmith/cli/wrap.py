"""Wrap text for a terminal, where a Chinese character is two cells wide and lines may break beside it."""

import argparse
import re

from rich.cells import cell_len

WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff01-\uff60"
OPENING, CLOSING = "（《「『“‘", "，。：；！？、）》」』”’"  # never at the end, and never at the start of a line
LABEL = re.compile(r" *(?:\S+ {2,})?")  # the label of a paragraph, under which further lines are indented
PIECE = re.compile(rf"\s*[{OPENING}]*(?:[{WIDE}]|[^\s{WIDE}{OPENING}{CLOSING}]+)?[{CLOSING}]*")


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Wrap `text` into lines of at most `width` cells, at spaces and beside Chinese characters.

    indent: what further lines of a paragraph begin with. A word that is too long, such as a path, is not broken: the
    terminal breaks it, and it can still be copied.
    """
    return [line for paragraph in text.split("\n") for line in _paragraph(paragraph, width, indent)]


def hang(text: str, width: int) -> list[str]:
    """As `wrap`, but further lines of a paragraph such as `label   text` are indented to its text."""
    lines = []
    for paragraph in text.split("\n"):
        label = LABEL.match(paragraph)
        lines += wrap(paragraph, width, " " * cell_len(label[0]) if label else "")
    return lines


def pad(text: str, cells: int) -> str:
    """`text` padded with spaces to `cells` cells."""
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
    """argparse's formatter with our wrapping: its own counts characters, and breaks lines at spaces only."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in wrap(" ".join(text.split()), width - len(indent)))
