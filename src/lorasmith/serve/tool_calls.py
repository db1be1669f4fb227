"""Parsing tool calls in replies, in the most common format: <tool_call>{...}</tool_call>."""

import json
import re
import secrets
from typing import Any

from lorasmith.config.files import parse_json

OPEN = "<tool_call>"
CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text before the tool calls, and the calls in OpenAI's format. If a call is not valid JSON, all is text."""
    calls = []
    for body in CALL.findall(text):
        try:
            call = parse_json(body)
        except ValueError:
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return text, []
        arguments = call.get("arguments", call.get("parameters", {}))
        function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    return (text.split(OPEN)[0].strip(), calls) if calls else (text, [])


class ToolCallStream:
    """Filters the text of a streamed reply: withholds everything from the first tool call on."""

    def __init__(self) -> None:
        self._buffer = ""

    def push(self, text: str) -> str:
        """Add text; returns what can be sent, which excludes a possible beginning of the tag."""
        self._buffer += text
        at = self._buffer.find(OPEN)
        if at < 0:
            size = len(self._buffer)
            at = size - max(n for n in range(len(OPEN)) if OPEN.startswith(self._buffer[size - n :]))
        shown, self._buffer = self._buffer[:at], self._buffer[at:]
        return shown

    def close(self) -> tuple[str, list[dict[str, Any]]]:
        """The remaining text and the tool calls, at the end of the reply."""
        return parse_tool_calls(self._buffer)
