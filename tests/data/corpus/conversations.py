"""The kinds of conversations that the corpus tries, with contents that no template contains."""

import copy
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_stock0z",
            "description": "Stock of an item",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string", "description": "Name"}},
                "required": ["item"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Qsystem0z."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdef123", "type": "function", "function": {"name": "get_stock0z", "arguments": {"item": "Qitem0z"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "name": "get_stock0z", "content": "Qresult0z"}


def asked(number: int = 0) -> dict[str, Any]:
    """A user message."""
    return {"role": "user", "content": f"Quser{number}z?"}


def answered(number: int = 0, reasoning: bool = False, inline: bool = False) -> dict[str, Any]:
    """An answer; with its reasoning under a key of its own, or inline."""
    content, thought = f"Qanswer{number}z.", f"Qthought{number}z."
    if inline:
        return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{content}"}
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if reasoning else {})


KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [asked(), answered()],
    "system": [SYSTEM, asked(), answered()],
    "two turns": [asked(), answered(), asked(1), answered(1)],
    "system, two turns": [SYSTEM, asked(), answered(), asked(1), answered(1)],
    "thinking": [asked(), answered(reasoning=True)],
    "thinking, two turns": [asked(), answered(0, True), asked(1), answered(1, True)],
    "inline thinking": [asked(), answered(inline=True)],
    "tool call": [asked(), copy.deepcopy(CALL), RESULT, answered()],
}
