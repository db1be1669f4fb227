"""Cells of tables: lists written as JSON text, as in CSV, TSV and many Parquet files, and nulls that Arrow adds."""

from typing import Any

from lorasmith.config.files import Malformed, parse_json
from lorasmith.i18n import _

LIST_COLUMNS = (
    "messages",
    "conversations",
    "conversation",
    "tools",
    "functions",
    "history",
)  # columns that never hold plain text


def parse_list_cells(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its `LIST_COLUMNS` parsed. Text that is not a JSON list or object stays; see `json_problem`."""
    return row | {key: _parse(row[key]) for key in LIST_COLUMNS if isinstance(row.get(key), str)}


def drop_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without nulls inside its values: Arrow adds them, because all objects of a column have the same keys."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def json_problem(key: str, text: str) -> str | None:
    """Why this text is not valid JSON, as a sentence; None if it is, or does not look like JSON."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        parse_json(text)
    except Malformed as error:
        if text.lstrip(" \t\r\n[").startswith("{'"):
            return _("'{key}' contains a Python literal, not JSON. Write it with json.dumps.", key=key)
        if error.line is None:
            return _("'{key}' is text that is not valid JSON: {why}.", key=key, why=error.why)
        return _(
            "'{key}' is not valid JSON (line {line}, column {column} of its text): {why}.",
            key=key,
            line=error.line,
            column=error.column,
            why=error.why,
        )
    return None


def _parse(text: str) -> object:
    try:
        found: object = parse_json(text)
    except Malformed:
        return text
    return found if isinstance(found, list | dict) else text
