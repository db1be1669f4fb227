"""What is to be answered, from a file or a pipe: a prompt a line, or rows as for training.

Both become records that end with an answer that nobody reads: `template.conversation(record).messages[:-1]` is asked.
"""

from collections.abc import Iterable
from pathlib import Path

from lorasmith.config.files import Malformed, parse_json
from lorasmith.data.read.files import ROW_FILES, not_an_object, rows_of
from lorasmith.data.read.json_rows import not_json
from lorasmith.data.read.stream import Broken, Source
from lorasmith.data.rows.cells import unfolded
from lorasmith.data.rows.conversation import Problems, Record
from lorasmith.data.rows.forms import answer_column, recognised, row_problem
from lorasmith.data.rows.messages import OPENAI, style_of
from lorasmith.errors import DataError
from lorasmith.i18n import _, foreign
from lorasmith.report import Report

UNREAD = "-"  # the answer that stands where none is asked for


def as_record(prompt: str, source: str = "") -> Record:
    """One user message to be answered."""
    return Record(_with_an_answer({"messages": [{"role": "user", "content": prompt}]}), source)


def read_prompts(path: Path) -> list[Record]:
    """All that a file asks: rows where its name ends as that of a file of rows, else a prompt a line.

    Raises DataError with every bad row by its line.
    """
    source = Source(str(path), "--file", Report())
    if source.suffix in ROW_FILES:
        return _records(rows_of(source), source.option)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(_("--file: {file}: cannot be read: {why}", file=path, why=foreign(error.strerror))) from None
    except UnicodeDecodeError as error:
        raise DataError(
            _("--file: {file}: byte {at} is not valid UTF-8. Save the file as UTF-8.", file=path, at=error.start)
        ) from None
    found = parse_prompts(text.split("\n"), False, str(path))
    if not found:
        raise DataError(_("--file: {file} contains no prompts. Write one prompt per line.", file=path))
    return found


def parse_prompts(lines: Iterable[str], rows: bool, source: str) -> list[Record]:
    """The same from lines: with `rows` each a JSON object, else each a prompt; empty ones are passed over."""
    numbered = [(f"{source}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if rows:
        return _records([(at, _object(line)) for at, line in numbered], _("prompts"))
    return [as_record(line, at) for at, line in numbered]


def _object(line: str) -> object:
    """The row, or the sentence that says why there is none."""
    try:
        row: object = parse_json(line)
    except Malformed as error:
        return Broken(not_json(error))
    return row


def _records(rows: Iterable[tuple[str, object]], option: str) -> list[Record]:
    """Each row by its own form: what is asked needs no one form, because nothing is learned from it."""
    problems, found = Problems(option), []
    for source, row in rows:
        if not isinstance(row, dict):
            problems.add(source, str(row) if isinstance(row, Broken) else not_an_object(row))
            continue
        fields = _with_an_answer(unfolded(row))
        form = recognised([fields])
        if (text := row_problem(fields, form) or (form.left_out(fields) if form else None)) is not None:
            problems.add(source, text)
        elif form is not None and form.required == ("text",):
            problems.add(source, _("a 'text' row is not a prompt. Rename the key to 'prompt'."))
        found.append(Record(fields, source))
    problems.raise_any()
    return found


def _with_an_answer(row: dict[str, object]) -> dict[str, object]:
    """The row with one answer at its end, whatever it has there, so that it can be checked as a row to learn from."""
    for key in ("messages", "conversations"):
        if isinstance(messages := row.get(key), list):
            style = style_of(messages)
            answer = "assistant" if style is OPENAI else "gpt"
            last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
            asked = messages[:-1] if style.roles.get(str(last.get(style.role))) == "assistant" else messages
            answered = [*asked, {style.role: answer, style.content: UNREAD}] if asked else []
            return {**row, key: answered}
    return {**row, answer_column(row): UNREAD}
