"""Records (rows of data), conversations (what templates encode), and the collection of errors in many rows.

`data/rows/formats.py` converts a record to a conversation. Nothing here depends on files, row formats or tokenizers.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorasmith.config.values import range_text, ranges
from lorasmith.errors import DataError
from lorasmith.i18n import _, listed

MAX_LISTED = 20  # problems, or places of one problem, that are listed; further ones are only counted
MAX_PLACES = 5  # rows that a note or a warning names before it only counts them
FEW = 0.1  # part of the rows up to which leaving them out is advised


@dataclass(frozen=True, slots=True)
class Record:
    """One row of data.

    fields: the columns that its format reads, under our names. source: where it comes from, counted from 1, such as
    'train.jsonl:812' (a line) or 'folder row 812'.
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
    reasoning: str = ""
    masked: tuple[tuple[int, int], ...] = ()


class Message(_Turn):
    """One message of a conversation. role is one of config.data.ROLES.

    tool_calls: function calls of an answer, each {"type": "function", "function": {"name", "arguments"}}. tool_call_id
    and name: the call that a message of the role 'tool' responds to. learn: whether an answer is trained on; weight:
    its weight in the loss. reasoning: the thinking before an answer, `reasoning_content` in the OpenAI form. masked:
    parts of the content that are not trained on although the answer is, as ascending half-open spans of characters.
    """

    __slots__ = ()

    def _asdict(self) -> dict[str, object]:
        """The message for a chat template: role, content, and the keys for tools that are set."""
        shown: dict[str, object] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            shown["tool_calls"] = list(self.tool_calls)
        return shown | {
            key: value for key, value in (("tool_call_id", self.tool_call_id), ("name", self.name)) if value is not None
        }


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as a template encodes it, whatever its format was.

    tools: JSON schemas of the functions that the model may call. text: plain text to train on as a whole; then there
    are no messages. desirable: whether its answer is a good one, in a preference row; None in any other row.
    """

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, object], ...] = ()
    text: str | None = None
    desirable: bool | None = None


class RowError(DataError):
    """A row cannot be used. text: the reason; source: where the row comes from."""

    def __init__(self, source: str, text: str) -> None:
        super().__init__(_("{place}: {problem}", place=places([source]), problem=text) if source else text)
        self.source = source
        self.text = text


def type_name(value: object) -> str:
    """The type of a JSON value, for messages."""
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
    """The keys in quotes, as a list for messages: 'a', 'b'."""
    return listed(f"'{key}'" for key in keys)


def places(sources: Sequence[str], most: int = MAX_LISTED) -> str:
    """Sources of rows as text for messages: 'train.jsonl line 812', or 'train.jsonl lines 3, 5, 9 and 17 more'."""
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
    """Collects the problems of many rows, to raise them together. The same problem of several rows is one line."""

    option: str
    sources: dict[str, list[str]] = field(default_factory=dict)

    def add(self, source: str, text: str) -> None:
        """Add a row with this problem."""
        self.sources.setdefault(text, []).append(source)

    def texts(self) -> list[str]:
        """One sentence per problem, at most 20, and one that counts the remaining rows."""
        texts = [f"{self.option}: {places(found)}: {text}" for text, found in list(self.sources.items())[:MAX_LISTED]]
        rest = sum(len(found) for found in list(self.sources.values())[MAX_LISTED:])
        if rest:
            texts.append(_("{option}: {rest} more rows have problems.", option=self.option, rest=f"{rest:,}"))
        return texts

    @property
    def count(self) -> int:
        """The number of rows with problems."""
        return sum(map(len, self.sources.values()))

    def skip_or_raise(self, limit: float, total: int) -> list[str]:
        """One sentence per problem, for the rows that are skipped.

        limit: how many rows may be skipped, or below 1 which fraction of `total`. Raises DataError with all problems
        if there are more.
        """
        allowed = int(limit if limit >= 1 else round(limit * total, 6))
        if self.count > allowed:
            raise DataError(*self.texts(), *self._advice(limit, total))
        texts = [
            _("{place}: skipped: {why}", place=places(found, MAX_PLACES), why=why)
            for why, found in self.sources.items()
        ]
        rest = sum(len(found) for found in list(self.sources.values())[MAX_LISTED:])
        more = _("{option}: {rest} more rows have problems.", option=self.option, rest=f"{rest:,}")
        return texts[:MAX_LISTED] + ([more] if rest else [])

    def _advice(self, limit: float, total: int) -> list[str]:
        """What to do about few bad rows, or about more than `limit`."""
        values = {"option": self.option, "count": f"{self.count:,}", "total": f"{total:,}", "limit": f"{limit:g}"}
        if limit:
            return [
                _(
                    "{option}: {count} of {total} rows have problems, more than data.skip_bad_rows = {limit} allows.",
                    **values,
                )
            ]
        if self.count > FEW * total:
            return []
        return [
            _(
                "{option}: {count} of {total} rows have problems. To leave them out, use --skip-bad-rows {limit}.",
                **values | {"limit": f"{self.count}"},
            )
        ]

    def raise_any(self) -> None:
        """Raise DataError if there are problems."""
        if self.sources:
            raise DataError(*self.texts())
