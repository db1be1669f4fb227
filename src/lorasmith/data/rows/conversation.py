"""A conversation, the only form that templates know; the row that it comes from; and how problems of rows are told.

It knows no file, no form of rows and no tokenizer: `data/rows/forms.py` makes conversations of rows.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorasmith.config.values import range_text, ranges
from lorasmith.errors import DataError
from lorasmith.i18n import _, listed

ROLES = ("system", "user", "assistant", "tool")
LISTED = 20  # problems, or places of one problem, that a message lists before it only counts


@dataclass(frozen=True, slots=True)
class Record:
    """One row, its columns under the names that we know and only those; `source` is 'train.jsonl:812' (a line) or
    'folder row 812', counted from 1.
    """

    fields: dict[str, object]
    source: str


class _Turn(NamedTuple):
    role: str
    content: str
    tool_calls: tuple[dict[str, object], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    learn: bool = True
    weight: float = 1.0


class Message(_Turn):
    """One turn of a conversation; role is one of `ROLES`.

    tool_calls, each {"type": "function", "function": {"name", "arguments"}}: what an answer asks of tools; tool_call_id
    and name: which call a tool's message answers. learn and weight: whether an answer is learned, how much it counts.
    """

    __slots__ = ()

    def _asdict(self) -> dict[str, object]:
        """What a chat template may see: role, content, and of the keys for tools those that are set."""
        shown: dict[str, object] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            shown["tool_calls"] = list(self.tool_calls)
        return shown | {
            key: value for key, value in (("tool_call_id", self.tool_call_id), ("name", self.name)) if value is not None
        }


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row in the only form that templates know.

    tools: JSON schemas of the functions that may be called. text: a plain text, learned whole, with no messages.
    """

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, object], ...] = ()
    text: str | None = None


class RowError(DataError):
    """One row cannot be learned from: `text` says why, `source` where."""

    def __init__(self, source: str, text: str) -> None:
        super().__init__(_("{place}: {problem}", place=places([source]), problem=text) if source else text)
        self.source = source
        self.text = text


def kind_of(value: object) -> str:
    """What a value is, for a reader."""
    if value is None:
        return _("null")
    if isinstance(value, bool):
        return _("true or false")
    if isinstance(value, int | float):
        return _("a number")
    if isinstance(value, str):
        return _("text")
    return _("a list") if isinstance(value, list | tuple) else _("an object")


def quoted(keys: Iterable[object]) -> str:
    """'a', 'b'."""
    return listed(f"'{key}'" for key in keys)


def places(sources: Sequence[str], most: int = LISTED) -> str:
    """Where rows stand, for a reader: 'train.jsonl line 812', or 'train.jsonl lines 3, 5, 9 and 17 more'."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        match = re.fullmatch(r"(.*?)(:| row )(\d+)", source, re.DOTALL)
        key, number = ((match[1], match[2]), match[3]) if match else ((source, ""), "")
        numbers.setdefault(key, []).append(number)
    return "; ".join(_in_one_file(file, mark, found, most) for (file, mark), found in numbers.items())


def _in_one_file(file: str, mark: str, numbers: list[str], most: int) -> str:
    if not mark:
        return file
    parts = ranges(map(int, numbers))
    shown, more = listed(map(range_text, parts[:most])), sum(map(len, parts[most:]))
    if more:
        shown = _("{numbers} and {more} more", numbers=shown, more=f"{more:,}")
    if mark == ":":
        text = _("{file} line {numbers}") if len(numbers) == 1 else _("{file} lines {numbers}")
    else:
        text = _("{file} row {numbers}") if len(numbers) == 1 else _("{file} rows {numbers}")
    return text.format(file=file, numbers=shown)


@dataclass
class Problems:
    """Collects what is wrong with many rows, to raise it once: the same problem of many rows is one line."""

    option: str
    sources: dict[str, list[str]] = field(default_factory=dict)

    def add(self, source: str, text: str) -> None:
        """One more row with this problem."""
        self.sources.setdefault(text, []).append(source)

    def texts(self) -> list[str]:
        """At most 20 sentences, and one that counts the rest."""
        texts = [f"{self.option}: {places(found)}: {text}" for text, found in list(self.sources.items())[:LISTED]]
        rest = sum(len(found) for found in list(self.sources.values())[LISTED:])
        if rest:
            texts.append(_("{option}: {rest} more rows have problems.", option=self.option, rest=f"{rest:,}"))
        return texts

    def raise_any(self) -> None:
        """Raises DataError if a problem was added."""
        if self.sources:
            raise DataError(*self.texts())
