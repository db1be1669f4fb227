"""Lists that a cell holds as JSON text, as CSV, TSV and many Parquet files have them."""

from typing import Any

from lorasmith.config.files import Malformed, parse_json
from lorasmith.i18n import _

LISTS = ("messages", "conversations", "tools", "history")  # columns that no row means as text


def unfolded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with such columns as lists; a text that is no JSON stays, and `json_problem` says why."""
    return row | {key: _read(row[key]) for key in LISTS if isinstance(row.get(key), str)}


def json_problem(key: str, text: str) -> str | None:
    """Why this text is no list in JSON, as a sentence; None where it does not look like one."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        parse_json(text)
    except Malformed as error:
        if text.lstrip(" \t\r\n[").startswith("{'"):
            return _("'{key}' holds a Python literal, not JSON. Write it with json.dumps.", key=key)
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


def _read(text: str) -> object:
    try:
        found: object = parse_json(text)
    except Malformed:
        return text
    return found if isinstance(found, list | dict) else text
