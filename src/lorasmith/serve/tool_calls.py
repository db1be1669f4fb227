"""Parsing tool calls in replies, in the most common format: <tool_call>{...}</tool_call>."""

import json
import re
import secrets
from typing import Any

from lorasmith.config.files import parse_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


def parse_tool_calls(text: str, is_call: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """The text before the tool calls, and the calls in OpenAI's format. If a call is not valid JSON, all is text.

    is_call: whether the text is a call even without its tags, which are special tokens of some models.
    """
    calls = []
    for body in CALL.findall(OPEN + text if is_call and OPEN not in text else text):
        try:
            call = parse_json(body)
        except ValueError:
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return text, []
        function = {"name": call["name"], "arguments": _json_text(call.get("arguments", call.get("parameters", {})))}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    return (text.split(OPEN)[0].strip() if OPEN in text else "", calls) if calls else (text, [])


def _json_text(arguments: Any) -> str:
    """The arguments of a call as a JSON text; some models write them as one already."""
    if isinstance(arguments, str):
        try:
            if isinstance(parse_json(arguments), dict):
                return arguments
        except ValueError:
            pass
    return json.dumps(arguments, ensure_ascii=False)


class ToolCallStream:
    """Filters the text of a streamed reply: withholds everything from the first tool call on.

    is_call: whether the whole reply is a call.
    """

    def __init__(self, is_call: bool = False) -> None:
        self._buffer, self._is_call = "", is_call

    def push(self, text: str) -> str:
        """Add text; returns what can be sent, which excludes a possible beginning of the tag."""
        self._buffer += text
        if self._is_call:
            return ""
        at = self._buffer.find(OPEN)
        if at < 0:
            size = len(self._buffer)
            at = size - max(n for n in range(len(OPEN)) if OPEN.startswith(self._buffer[size - n :]))
        shown, self._buffer = self._buffer[:at], self._buffer[at:]
        return shown

    def close(self) -> str:
        """The text that was withheld, at the end of the reply."""
        return self._buffer
