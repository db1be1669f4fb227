"""Read rows from JSON Lines, or from one JSON list, with the line where each row begins; and whole texts."""

import codecs
import re
from collections.abc import Iterator

from lorasmith.config.files import Malformed, parse_item, parse_json
from lorasmith.data.read.stream import BadRow, Source, open_source
from lorasmith.data.rows.conversation import quoted
from lorasmith.errors import DataError
from lorasmith.i18n import _

BLANK = re.compile(r"[ \t\n\r]*")
ITEMS = 10_000  # items of a list between two progress reports


def json_lines(source: Source) -> Iterator[tuple[str, object]]:
    """The rows of a JSON Lines file.

    Lines are split as bytes: other line separators of Unicode may stand in a text, and an invalid byte affects one row.
    Raises DataError if the file is a single object over several lines.
    """
    first = True
    with open_source(source) as file:
        lines = (line for block in file for line in block.splitlines(keepends=True))  # an old Mac ends lines with \r
        for number, raw in enumerate(lines, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not line.strip():
                continue
            row = _line(line)
            if first and isinstance(row, BadRow):
                _refuse_one_object(source)
            first = False
            yield f"{source.name}:{number}", row


def _line(line: bytes) -> object:
    try:
        row: object = parse_json(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BadRow(_("byte {byte} of this line is not valid UTF-8. Save the file as UTF-8.", byte=error.start + 1))
    except Malformed as error:
        return BadRow(python_literal(line.decode("utf-8")) or not_json(error))
    return row


def python_literal(text: str) -> str | None:
    """The error text for a row that Python printed, with 'single quotes'; None for any other text."""
    if not re.match(r"[\s\[]*\{\s*'", text):
        return None
    return _("not JSON but Python, with 'single quotes'. Write it with json.dumps.")


def not_json(error: Malformed) -> str:
    """The error text for a row whose line is already known."""
    if error.column is None:
        return _("not valid JSON: {why}.", why=error.why)
    return _("not valid JSON at column {column}: {why}.", column=error.column, why=error.why)


def _refuse_one_object(source: Source) -> None:
    """Raise DataError if the whole file is one object; else every one of its lines would be reported."""
    try:
        with open_source(source) as file:
            whole = parse_json(file.read())
    except Malformed:
        return
    if text := columns_problem(whole):
        raise DataError(f"{source.option}: {source.name} {text}")
    keys = quoted(whole) if isinstance(whole, dict) else ""
    raise DataError(
        _(
            "{option}: {file} is a single JSON object ({keys}), not a list of rows. Write the rows as a list "
            "in [ ], or one row per line.",
            **source.placeholders,
            keys=keys,
        )
    )


def columns_problem(value: object) -> str | None:
    """The error text for an object with a list of all values of each column, the only one of a file; else None.

    Pandas writes the values of a column as an object, too, under the numbers of the rows.
    """
    if not isinstance(value, dict) or not value:
        return None
    columns = [_cells(column) for column in value.values()]
    cells = [cell for column in columns for cell in column]
    if len({len(column) for column in columns}) > 1 or any(isinstance(one, list | dict) for one in cells):
        return None
    if not any(isinstance(one, str) for one in cells):
        return None  # a row of token ids
    return _(
        "holds the columns {keys}, each with {count} values, instead of rows. Write one object per row; with pandas: "
        "to_json(FILE, orient='records', lines=True).",
        keys=quoted(value),
        count=len(columns[0]),
    )


def _cells(column: object) -> list[object]:
    if isinstance(column, dict) and column.keys() == {*map(str, range(len(column)))}:
        return list(column.values())
    return column if isinstance(column, list) else []


def document(source: Source) -> Iterator[tuple[str, object]]:
    """A text file as one row, with line ends as on Unix. Raises DataError."""
    yield source.name, {"text": _text(source).replace("\r\n", "\n").replace("\r", "\n")}


def json_list(source: Source) -> Iterator[tuple[str, object]]:
    """The items of a JSON list. They are parsed one by one to know their lines. Raises DataError at a syntax error."""
    text, line, counted, done = _text(source), 1, 0, 0
    at = _after_blank(text, text.index("[") + 1)
    end = "]" if text[at : at + 1] == "]" else ","
    while end == ",":
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = parse_item(text, at)
        except Malformed as error:
            raise DataError(_broken(source, text, at if error.at is None else error.at, error.why)) from error
        yield f"{source.name}:{line}", item
        done += 1
        if done % ITEMS == 0:
            source.report.progress(source.task, at, len(text))
        at = _after_blank(text, at)
        end = text[at : at + 1]
        if end not in (",", "]"):
            raise DataError(_broken(source, text, at, _("a comma or the closing ] is missing")))
        at = _after_blank(text, at + 1) if end == "," else at
    rest = _after_blank(text, at + 1)
    if rest < len(text):
        raise DataError(_broken(source, text, rest, _("there is more text after the closing ] of the list")))


def _text(source: Source) -> str:
    with open_source(source) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            _(
                "{option}: {file} line {line} is not valid UTF-8. Save the file as UTF-8.",
                **source.placeholders,
                line=line,
            )
        ) from error


def _broken(source: Source, text: str, at: int, why: str) -> str:
    if literal := python_literal(text):
        return f"{source.option}: {source.name}: {literal}"
    if at >= len(text.rstrip()):
        why = _("the file ends in the middle of the list, perhaps because it was copied incompletely")
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return _(
        "{option}: {file} line {line}, column {column}: not valid JSON: {why}.",
        **source.placeholders,
        line=line,
        column=column,
        why=why.rstrip(".。"),
    )


def _after_blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    return match.end() if match else at
