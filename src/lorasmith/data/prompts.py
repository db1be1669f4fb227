"""What is to be answered, from a file or a pipe: a prompt a line, or rows as for training.

Both become records that end with an answer that nobody reads: `template.conversation(record).messages[:-1]` is asked.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from lorasmith.data.conversation import Problems, Record, problem
from lorasmith.errors import DataError
from lorasmith.i18n import _

ROWS = (".json", ".jsonl")  # files of rows; any other holds a prompt a line
UNREAD = "-"  # the answer that stands where none is asked for


def as_record(prompt: str, source: str = "") -> Record:
    """One user message to be answered."""
    return Record(_with_an_answer({"messages": [{"role": "user", "content": prompt}]}), source)


def read_prompts(path: Path) -> list[Record]:
    """All that a file asks. Raises DataError with every bad row by its line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(_("--file: {file}: cannot be read: {why}", file=path, why=error.strerror)) from None
    except UnicodeDecodeError as error:
        raise DataError(
            _("--file: {file}: byte {at} is no UTF-8. Save it as UTF-8.", file=path, at=error.start)
        ) from None
    is_rows = path.suffix.lower() in ROWS
    if is_rows and text.lstrip()[:1] == "[":
        found = _records(_list(text, path))
    else:
        found = parse_prompts(text.split("\n"), is_rows, str(path))
    if not found:
        raise DataError(_("--file: {file} holds no prompt. Write one a line.", file=path))
    return found


def parse_prompts(lines: Iterable[str], rows: bool, source: str) -> list[Record]:
    """The same from lines: with `rows` each a JSON object, else each a prompt; empty ones are passed over."""
    numbered = [(f"{source}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if rows:
        return _records([(at, _object(line)) for at, line in numbered])
    return [as_record(line, at) for at, line in numbered]


def _object(line: str) -> object:
    """The row, or the sentence that says why there is none."""
    try:
        row: object = json.loads(line)
    except json.JSONDecodeError as error:
        return _("not valid JSON at column {column}: {why}.", column=error.colno, why=error.msg)
    return row


def _list(text: str, path: Path) -> list[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            _("--file: {file} line {line}: not valid JSON: {why}.", file=path, line=error.lineno, why=error.msg)
        ) from None
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _records(rows: Iterable[tuple[str, object]]) -> list[Record]:
    problems, found = Problems(_("prompts")), []
    for source, row in rows:
        if not isinstance(row, dict):
            example = '{"messages": [...]}'
            problems.add(
                source, row if isinstance(row, str) else _("a row must be an object: {example}", example=example)
            )
            continue
        record = Record(_with_an_answer(row), source)
        if (text := problem(record.fields)) is not None:
            problems.add(source, text)
        found.append(record)
    problems.raise_any()
    return found


def _with_an_answer(row: dict[str, object]) -> dict[str, object]:
    """The row with one answer at its end, whatever it has there, so that it can be checked as a row to learn from."""
    messages = row.get("messages")
    if isinstance(messages, list):
        asked = messages[:-1] if messages and _role(messages[-1]) == "assistant" else messages
        return {"messages": [*asked, {"role": "assistant", "content": UNREAD}] if asked else []}
    if "prompt" in row and "instruction" not in row:
        row = {"instruction": row["prompt"]}
    return {**row, "output": UNREAD}


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None
