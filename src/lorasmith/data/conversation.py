"""A row of data, checked and made into a conversation: the only form that templates know.

Two forms of rows are known: alpaca (`instruction`, `input`, `output`) and chat (`messages` of `role`, `content`).
It knows no file and no tokenizer.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NamedTuple

from lorasmith.errors import DataError
from lorasmith.i18n import _

ROLES = ("system", "user", "assistant")
KNOWN_KEYS = frozenset({"instruction", "input", "output", "messages"})
LISTED = 20  # problems, or places of one problem, that a message lists before it only counts
# What other tools call the same columns.
OTHER_NAMES = {
    "conversations": "messages",
    "conversation": "messages",
    "chat": "messages",
    "prompt": "instruction",
    "question": "instruction",
    "query": "instruction",
    "context": "input",
    "response": "output",
    "answer": "output",
    "completion": "output",
    "target": "output",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file has it; `source` is 'train.jsonl:812' (a line) or 'folder row 812', counted from 1."""

    fields: dict[str, object]
    source: str


class Message(NamedTuple):
    """One turn of a conversation; role is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row in the only form that templates know."""

    messages: tuple[Message, ...]
    source: str


class RowError(DataError):
    """One row cannot be learned from: `text` says why, `source` where."""

    def __init__(self, source: str, text: str) -> None:
        super().__init__(_("{place}: {problem}", place=places([source]), problem=text) if source else text)
        self.source = source
        self.text = text


def conversation(record: Record, strip: bool = True) -> Conversation:
    """The record's messages; an alpaca row is one user message and its answer.

    `strip=False` keeps the blanks around instruction and input, for a template that strips by its own rule.
    Raises RowError where the row is neither form or has nothing to learn from.
    """
    text = problem(record.fields)
    if text is not None:
        raise RowError(record.source, text)
    fields = record.fields
    if "messages" in fields:
        return Conversation(tuple(_messages(fields["messages"])), record.source)
    asked = f"{fields['instruction']}\n{fields.get('input') or ''}"
    answer = Message("assistant", str(fields["output"]))
    return Conversation((Message("user", asked.strip() if strip else asked), answer), record.source)


def problem(fields: dict[str, object]) -> str | None:
    """Why this row cannot be learned from, as a sentence; None where it can."""
    if "messages" in fields:
        return _chat_problem(fields["messages"])
    if "instruction" in fields and "output" in fields:
        return _alpaca_problem(fields)
    return _columns_problem(fields)


def _messages(value: object) -> list[Message]:
    assert isinstance(value, list)
    return [Message(message["role"], message["content"]) for message in value]


def _alpaca_problem(fields: dict[str, object]) -> str | None:
    for key in ("instruction", "input", "output"):
        value = fields.get(key)
        if not isinstance(value, str) and not (key == "input" and value is None):
            return _("'{key}' must be text, found {found}.", key=key, found=_kind(value))
        if isinstance(value, str) and not _is_unicode(value):
            return _("'{key}' holds half a character (a lone surrogate). Write the file again as UTF-8.", key=key)
    if not str(fields["output"]).strip():
        return _("'output' is empty, so there is nothing to learn from it. Drop the row or add an answer.")
    return None


def _chat_problem(messages: object) -> str | None:
    if not isinstance(messages, list):
        return _("'messages' must be a list of messages, found {found}.", found=_kind(messages))
    if not messages:
        return _("'messages' is empty, so there is nothing to learn from it. Drop the row or add messages.")
    for number, message in enumerate(messages, 1):
        text = _message_problem(number, message)
        if text is not None:
            return text
    if not any(message["role"] == "assistant" for message in messages):
        return _(
            "no message has role 'assistant', so there is nothing to learn from it. Drop the row or add an answer."
        )
    return None


def _message_problem(number: int, message: object) -> str | None:
    if not isinstance(message, dict):
        return _(
            "message {number} must be an object with 'role' and 'content', found {found}.",
            number=number,
            found=_kind(message),
        )
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        return _(
            'message {number} has no \'{key}\', only {found}. A message is {{"role": ..., "content": ...}}.',
            number=number,
            key=missing[0],
            found=_names(message),
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        return _(
            "message {number} has the role {role}; known are {known}.",
            number=number,
            role=repr(role),
            known=_names(ROLES),
        )
    if not isinstance(content, str):
        return _(
            "message {number} ({role}): 'content' must be text, found {found}.",
            number=number,
            role=role,
            found=_kind(content),
        )
    if not _is_unicode(content):
        return _(
            "message {number} ({role}): 'content' holds half a character (a lone surrogate). "
            "Write the file again as UTF-8.",
            number=number,
            role=role,
        )
    if role == "assistant" and not content.strip():
        return _(
            "message {number} (assistant) is empty, so there is nothing to learn from it. "
            "Drop the row or add an answer.",
            number=number,
        )
    return None


def _columns_problem(fields: dict[str, object]) -> str:
    text = _(
        "the row has {found}; known are rows with 'instruction', 'output' and, if there is one, 'input', "
        "or rows with 'messages'.",
        found=_names(fields) or _("no keys"),
    )
    for key in fields:
        lowered = key.lower()
        wanted = OTHER_NAMES.get(lowered) or next(iter(get_close_matches(lowered, sorted(KNOWN_KEYS), 1, 0.75)), None)
        if wanted and wanted not in fields:
            text += " " + _("Should '{key}' be '{wanted}'?", key=key, wanted=wanted)
    return text


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _kind(value: object) -> str:
    if value is None:
        return _("null")
    if isinstance(value, bool):
        return _("true or false")
    if isinstance(value, int | float):
        return _("a number")
    if isinstance(value, str):
        return _("text")
    return _("a list") if isinstance(value, list) else _("an object")


def _names(keys: Iterable[object]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


def places(sources: Sequence[str], listed: int = LISTED) -> str:
    """Where rows stand, for a reader: 'train.jsonl line 812', or 'train.jsonl lines 3, 5, 9 and 17 more'."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        match = re.fullmatch(r"(.*?)(:| row )(\d+)", source, re.DOTALL)
        key, number = ((match[1], match[2]), match[3]) if match else ((source, ""), "")
        numbers.setdefault(key, []).append(number)
    return "; ".join(_in_one_file(file, mark, found, listed) for (file, mark), found in numbers.items())


def _in_one_file(file: str, mark: str, numbers: list[str], listed: int) -> str:
    if not mark:
        return file
    shown, more = ", ".join(numbers[:listed]), len(numbers) - listed
    if more > 0:
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
            texts.append(_("{option}: and {rest} more rows with problems.", option=self.option, rest=f"{rest:,}"))
        return texts

    def raise_any(self) -> None:
        """Raises DataError if a problem was added."""
        if self.sources:
            raise DataError(*self.texts())
