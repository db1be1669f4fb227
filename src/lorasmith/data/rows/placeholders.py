"""Placeholders in the texts of rows, such as {{name}} in examples of who an assistant is, and what to put in them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
USUAL = frozenset({"name", "author"})  # left unfilled they are a mistake; others may be code, such as a Jinja template


def fill(row: dict[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """The row with every placeholder that `values` names replaced, in all its texts."""
    if not values or not values.keys() & placeholders(row):
        return row
    filled: dict[str, Any] = _filled(row, values)
    return filled


def placeholders(value: object) -> set[str]:
    """The names of the placeholders in all texts of a value."""
    return {name for text in _texts(value) if "{{" in text for name in _PLACEHOLDER.findall(text)}


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {key: _filled(inner, values) for key, inner in value.items()}
    return [_filled(inner, values) for inner in value] if isinstance(value, list) else value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
