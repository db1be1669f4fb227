"""Calls of tools in a reply's text, where the template has the form that most have: <tool_call>{...}</tool_call>."""

import json
import re
import secrets
from typing import Any

from lorasmith.config.files import parse_json

OPEN = "<tool_call>"
CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text before the calls, and the calls as OpenAI writes them; the whole text and none where one is not JSON."""
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
    """A reply's text as it streams, from a call on kept back until its end."""

    def __init__(self) -> None:
        self._kept = ""

    def push(self, text: str) -> str:
        """What can be shown already."""
        self._kept += text
        at = self._kept.find(OPEN)
        if at < 0:
            at = len(self._kept) - max(
                n for n in range(len(OPEN)) if OPEN.startswith(self._kept[len(self._kept) - n :])
            )
        shown, self._kept = self._kept[:at], self._kept[at:]
        return shown

    def close(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest: a text, or calls."""
        return parse_tool_calls(self._kept)
