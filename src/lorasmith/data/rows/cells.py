"""Lists that a cell holds as JSON text, as CSV, TSV and many Parquet files have them."""

import json
from typing import Any

from lorasmith.i18n import _, foreign

LISTS = ("messages", "conversations", "tools", "history")  # columns that no row means as text


def unfolded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with such columns as lists; a text that is no JSON stays, and `json_problem` says why."""
    return row | {key: _read(row[key]) for key in LISTS if isinstance(row.get(key), str)}


def json_problem(key: str, text: str) -> str | None:
    """Why this text is no list in JSON, as a sentence; None where it does not look like one."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        json.loads(text)
    except RecursionError:
        return _("'{key}' contains JSON that cannot be parsed: it is nested too deeply.", key=key)
    except json.JSONDecodeError as error:
        if text.lstrip(" \t\r\n[").startswith("{'"):
            return _("'{key}' holds a Python literal, not JSON. Write it with json.dumps.", key=key)
        return _(
            "'{key}' is not valid JSON (line {line}, column {column} of its text): {why}.",
            key=key,
            line=error.lineno,
            column=error.colno,
            why=foreign(error.msg),
        )
    return None


def _read(text: str) -> object:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, list | dict) else text
