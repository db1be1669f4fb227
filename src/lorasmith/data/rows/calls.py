"""Function calls and function schemas in the forms that files have, and OpenAI's form, which chat templates read.

A call: {"type": "function", "function": {"name": ..., "arguments": {...}}}.
A schema: {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}.
"""

from collections.abc import Iterable
from typing import Any

from lorasmith.config.files import Malformed, parse_json
from lorasmith.data.rows.cells import json_problem
from lorasmith.data.rows.conversation import type_name
from lorasmith.i18n import _

_ARGUMENTS = ("arguments", "parameters", "input")  # OpenAI's, Llama's and Anthropic's key for the arguments of a call


def listed_calls(value: object) -> list[Any]:
    """The calls of `tool_calls`, `function_call` or a message that is a call: one or a list, also as JSON text.

    Text that is not JSON is an item that `are_calls` refuses.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except Malformed:
            return [value]
    return value if isinstance(value, list) else [value] if value else []


def are_calls(calls: Iterable[object]) -> bool:
    """Whether `parse_call` can read all of these."""
    return all(map(_is_call, calls))


def parse_call(call: dict[str, object]) -> dict[str, object]:
    """A call in OpenAI's form, with its arguments as an object, which OpenAI's files have as JSON text."""
    function = call.get("function") or call
    assert isinstance(function, dict)
    arguments = _arguments(function)
    arguments = parse_json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    made: dict[str, object] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if call.get("id") is not None else made


def parse_tools(value: object) -> tuple[dict[str, object], ...]:
    """The schemas of `tools` or `functions`, of which `tools_problem` found nothing wrong, in OpenAI's form."""
    return tuple(_schema(tool) for tool in _tools(value))


def tools_problem(key: str, value: object) -> str | None:
    """Why the value of the column `key` is not a list of function schemas, as a sentence; None if it is or is empty."""
    if isinstance(value, str) and (text := json_problem(key, value)):
        return text
    if all(isinstance(tool, dict) for tool in _tools(value)):
        return None
    return _("'{key}' must be a list of function schemas, found {found}.", key=key, found=type_name(value))


def _tools(value: object) -> list[Any]:
    """The items of a list of schemas: the list, or each item of it, may be JSON text."""
    value = _unpacked(value)
    items = value if isinstance(value, list) else [value] if value else []
    return [_unpacked(item) for item in items]


def _unpacked(value: object) -> object:
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found: object = parse_json(value)
    except Malformed:
        return value
    return found


def _schema(tool: dict[str, object]) -> dict[str, object]:
    if isinstance(tool.get("function"), dict):
        return tool if "type" in tool else {"type": "function", **tool}
    if "name" not in tool:
        return tool
    bare = {key: value for key, value in tool.items() if key != "type" or value != "function"}
    if "input_schema" in bare and "parameters" not in bare:  # Anthropic's key
        bare["parameters"] = bare.pop("input_schema")
    return {"type": "function", "function": bare}


def _arguments(function: dict[str, object]) -> object:
    return next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None)


def _is_call(call: object) -> bool:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = _arguments(function)
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = parse_json(arguments)
        except Malformed:
            return False
    return not arguments or isinstance(arguments, dict)
