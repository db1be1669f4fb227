"""Read prompts from a file or a pipe: one prompt per line, or rows in the formats of training data.

Both become records whose last message is a placeholder answer, so that they can be checked as training rows are. The
prompt is `template.conversation(record).messages[:-1]`.
"""

from collections.abc import Iterable
from pathlib import Path

from lorasmith.config.files import Malformed, parse_json
from lorasmith.data.read.files import ROW_FILES, iter_rows, not_an_object
from lorasmith.data.read.json_rows import not_json
from lorasmith.data.read.stream import BadRow, Source
from lorasmith.data.rows.cells import parse_list_cells
from lorasmith.data.rows.conversation import Problems, Record
from lorasmith.data.rows.formats import answer_column, recognize_format, row_problem
from lorasmith.data.rows.styles import detect_style, expand_pairs
from lorasmith.errors import DataError
from lorasmith.i18n import _, foreign
from lorasmith.report import Report

PLACEHOLDER_ANSWER = "-"


def as_record(prompt: str, source: str = "") -> Record:
    """A record with one user message."""
    return Record(_with_an_answer({"messages": [{"role": "user", "content": prompt}]}), source)


def read_prompts(path: Path) -> list[Record]:
    """All prompts of a file: rows if it has the suffix of a data file, else one prompt per line.

    Raises DataError with all bad rows, or if there are no prompts.
    """
    source = Source(str(path), "--file", Report())
    if source.suffix in ROW_FILES:
        return _records(iter_rows(source), source.option)
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
    """The prompts in lines of text, without empty ones. rows: each line is a JSON object, else a prompt."""
    numbered = [(f"{source}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if rows:
        return _records([(at, _object(line)) for at, line in numbered], _("prompts"))
    return [as_record(line, at) for at, line in numbered]


def _object(line: str) -> object:
    """The parsed line, or a BadRow."""
    try:
        row: object = parse_json(line)
    except Malformed as error:
        return BadRow(not_json(error))
    return row


def _records(rows: Iterable[tuple[str, object]], option: str) -> list[Record]:
    """Rows as records. Unlike in training data, every row may have its own format."""
    problems, found = Problems(option), []
    for source, row in rows:
        if not isinstance(row, dict):
            problems.add(source, str(row) if isinstance(row, BadRow) else not_an_object(row))
            continue
        fields = _with_an_answer(parse_list_cells(row))
        row_format = recognize_format([fields])
        if (text := row_problem(fields, row_format)) is not None:
            problems.add(source, text)
        elif row_format is not None and row_format.required == ("text",):
            problems.add(source, _("a 'text' row is not a prompt. Rename the key to 'prompt'."))
        found.append(Record(fields, source))
    problems.raise_any()
    return found


def _with_an_answer(row: dict[str, object]) -> dict[str, object]:
    """The row with the placeholder as its last answer, instead of its own if it has one."""
    for key in ("messages", "conversations", "conversation"):
        if isinstance(messages := row.get(key), list):
            messages = expand_pairs(messages)
            style = detect_style(messages)
            asked = messages[:-1] if messages and style.role_of(messages[-1]) == "assistant" else messages
            answered = [*asked, {style.role: style.answer, style.content: PLACEHOLDER_ANSWER}] if asked else []
            return {**row, key: answered}
    return {**row, answer_column(row): PLACEHOLDER_ANSWER}
