"""Placeholders in the texts of rows, such as {{name}} in examples of who an assistant is, and what to put in them."""

import json
import re
from collections.abc import Mapping
from typing import Any

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_USUAL = frozenset({"name", "author"})  # left unfilled they are a mistake; others may be code, such as a Jinja template


def unfilled(value: object) -> set[str]:
    """The names of the usual placeholders in all texts of a value, in its spelling: ms-swift writes {{NAME}}."""
    return {name for name in placeholders(value) if name.lower() in _USUAL}


def fill(row: dict[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """The row with every placeholder that `values` names replaced, in all its texts."""
    if not values or not values.keys() & placeholders(row):
        return row
    filled: dict[str, Any] = _filled(row, values)
    return filled


def placeholders(value: object) -> set[str]:
    """The names of the placeholders in all texts of a value."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # two braces never follow each other in JSON itself
    return set(_PLACEHOLDER.findall(text)) if "{{" in text else set()


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {key: _filled(inner, values) for key, inner in value.items()}
    return [_filled(inner, values) for inner in value] if isinstance(value, list) else value
