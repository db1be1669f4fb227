"""Parse and check lists of messages: OpenAI's keys `role` and `content`, or ShareGPT's `from` and `value`.

The content is a text, or a list of parts like {"type": "text", "text": ...}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lorasmith.config.files import parse_json
from lorasmith.data.rows.cells import json_problem
from lorasmith.data.rows.conversation import ROLES, Message, quoted, type_name
from lorasmith.i18n import _

MAX_WEIGHT = 1_000_000  # more would make all other tokens of a step irrelevant
CALL = "call"  # a ShareGPT message whose text is function calls in JSON


@dataclass(frozen=True)
class MessageStyle:
    """The keys of role and content in a message, and the role that each name stands for."""

    role: str
    content: str
    roles: Mapping[str, str]


OPENAI = MessageStyle("role", "content", {role: role for role in ROLES})
SHAREGPT = MessageStyle(
    "from",
    "value",
    {
        "human": "user",
        "gpt": "assistant",
        "system": "system",
        "function": CALL,
        "function_call": CALL,
        "observation": "tool",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "function_response": "tool",
    },
)
SHAREGPT_ROLES = ("human", "gpt", "system", "function_call", "observation")  # those that error messages list
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "tool_call_id", "name", "learn", "weight", *REASONING_KEYS}
)


def detect_style(messages: list[object]) -> MessageStyle:
    """The style of a list of messages, by the keys of the first message that has `role` or `from`."""
    for message in messages:
        if isinstance(message, dict) and not message.keys().isdisjoint(("role", "from")):
            return OPENAI if "role" in message else SHAREGPT
    return OPENAI


def parse_messages(messages: list[dict[str, object]]) -> tuple[Message, ...]:
    """The messages of a list in which `messages_problem` found nothing wrong."""
    style = detect_style(list(messages))
    return tuple(_message(message, style) for message in messages)


def messages_problem(key: str, messages: object) -> str | None:
    """Why the messages under `key` are invalid or have no answer to train on, as a sentence; else None."""
    if messages in ("", []):
        return _("'{key}' is empty, so there is nothing to train on. Add messages, or remove the row.", key=key)
    if isinstance(messages, str) and (text := json_problem(key, messages)):
        return text
    if not isinstance(messages, list):
        return _("'{key}' must be a list of messages, found {found}.", key=key, found=type_name(messages))
    style = detect_style(messages)
    for number, message in enumerate(messages, 1):
        text = _message_problem(number, message, style)
        if text is not None:
            return text
    answers = [message for message in parse_messages(messages) if message.role == "assistant"]
    if not answers:
        names = [name for name, role in style.roles.items() if role == "assistant"]
        return _(
            "no message has the role {name}, so there is nothing to train on. Add an answer, or remove the row.",
            name=quoted(names[:1]),
        )
    if not any(answer.learn and answer.weight for answer in answers):
        return _("every answer has 'learn' false or 'weight' 0, so there is nothing to train on. Remove the row.")
    return None


def unsupported_content(messages: list[dict[str, object]]) -> str | None:
    """Why valid messages cannot be used, as a sentence: one has a part that is not text. None if all are text."""
    key = detect_style(list(messages)).content
    for message in messages:
        for part in _parts(message.get(key)):
            if part["type"] != "text":
                return _("a message has a part of type {type}, but only text is supported.", type=repr(part["type"]))
    return None


def tools_problem(value: object) -> str | None:
    """Why the value of `tools` is invalid, as a sentence; None if it is valid or empty."""
    if isinstance(value, str) and (text := json_problem("tools", value)):
        return text
    if value and (not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value)):
        return _("'tools' must be a list of function schemas, found {found}.", found=type_name(value))
    return None


def _parts(content: object) -> list[dict[str, object]]:
    """The parts of a content; empty if it is a text."""
    return content if isinstance(content, list) else []


def _text(content: object) -> str:
    """The text of a content. Parts are joined without a separator, as chat templates do."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in _parts(content))
    return str(content or "")


def _message(message: dict[str, object], style: MessageStyle) -> Message:
    role, content = style.roles[str(message[style.role])], message.get(style.content)
    calls: object = message.get("tool_calls")
    if role == CALL:
        role, calls, content = "assistant", parse_json(str(content)), ""
    listed: list[Any] = calls if isinstance(calls, list) else [calls] if calls else []
    learn, weight = message.get("learn"), message.get("weight")
    return Message(
        role,
        _text(content),
        tuple(_call(call) for call in listed),
        _optional(message.get("tool_call_id")),
        _optional(message.get("name")),
        learn is not False,
        float(weight) if isinstance(weight, int | float) else 1.0,
        next((str(message[key]) for key in REASONING_KEYS if message.get(key)), ""),
    )


def _optional(value: object) -> str | None:
    return None if value is None else str(value)


def _call(call: dict[str, object]) -> dict[str, object]:
    """A function call as chat templates expect it: arguments as an object, which OpenAI's files have as JSON text."""
    function = call.get("function") or call
    assert isinstance(function, dict)
    arguments = function.get("arguments")
    arguments = parse_json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    made: dict[str, object] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if call.get("id") is not None else made


def _message_problem(number: int, message: object, style: MessageStyle) -> str | None:
    if not isinstance(message, dict):
        return _(
            "message {number} must be an object with '{role}' and '{content}', found {found}.",
            number=number,
            role=style.role,
            content=style.content,
            found=type_name(message),
        )
    wanted = (style.role,) if message.get("tool_calls") else (style.role, style.content)
    missing = [key for key in wanted if key not in message]
    if missing:
        return _(
            "message {number} has no '{key}', only {found}. A message looks like {example}.",
            number=number,
            key=missing[0],
            found=quoted(message),
            example=f'{{"{style.role}": ..., "{style.content}": ...}}',
        )
    name = message[style.role]
    if not isinstance(name, str) or name not in style.roles:
        return _role_problem(number, name, style)
    text = _content_problem(message, style) or _calls_problem(message, style) or _learning_problem(message)
    return text and _("message {number} ({role}): {problem}", number=number, role=name, problem=text)


def _role_problem(number: int, name: object, style: MessageStyle) -> str:
    told = quoted(style.roles if style is OPENAI else SHAREGPT_ROLES)
    text = _(
        "message {number} has the unknown role {role}; supported roles are {known}.",
        number=number,
        role=repr(name),
        known=told,
    )
    near = get_close_matches(str(name).lower(), list(style.roles), 1)
    return text + " " + _("Did you mean '{near}'?", near=near[0]) if near else text


def _content_problem(message: dict[str, object], style: MessageStyle) -> str | None:
    content, role = message.get(style.content), style.roles[str(message[style.role])]
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, str | list):
        return _("'{key}' must be text, found {found}.", key=style.content, found=type_name(content))
    for number, part in enumerate(content, 1) if isinstance(content, list) else ():
        if (text := _part_problem(part)) is not None:
            return _("'{key}': part {number} {problem}", key=style.content, number=number, problem=text)
    if any(part["type"] != "text" for part in _parts(content)):
        return None  # the row will be skipped
    content = _text(content)
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        return _("the message is empty, so there is nothing to train on. Add an answer, or remove the row.")
    return None


def _part_problem(part: object) -> str | None:
    example = '{"type": "text", "text": ...}'
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return _("must look like {example}, found {found}.", example=example, found=type_name(part))
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        found = type_name(part["text"]) if "text" in part else quoted(part)
        return _("must look like {example}, found {found}.", example=example, found=found)
    return None


def _calls_problem(message: dict[str, object], style: MessageStyle) -> str | None:
    calls: object = message.get("tool_calls")
    role = style.roles[str(message[style.role])]
    if role == CALL:
        try:
            calls = parse_json(str(message[style.content]))
        except ValueError:
            calls = "?"
        calls = calls if isinstance(calls, list) else [calls]
        if not _are_calls(calls):
            return _(
                "the text must be a function call in JSON, such as {example}. For the result of a function, "
                "use the role 'observation'.",
                example='{"name": ..., "arguments": {...}}',
            )
    elif calls and role != "assistant":
        return _("only an assistant message can have 'tool_calls'.")
    elif calls and not _are_calls(calls):
        return _(
            "'tool_calls' must be a list like {example}; the arguments are an object, or the same as a JSON string.",
            example='[{"function": {"name": ..., "arguments": {...}}}]',
        )
    return None


def _are_calls(calls: object) -> bool:
    return isinstance(calls, list) and bool(calls) and all(_is_call(call) for call in calls)


def _is_call(call: object) -> bool:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = parse_json(arguments)
        except ValueError:
            return False
    return not arguments or isinstance(arguments, dict)


def _learning_problem(message: dict[str, object]) -> str | None:
    learn, weight = message.get("learn"), message.get("weight")
    if learn is not None and not isinstance(learn, bool):
        return _("'learn' must be true or false, found {found}.", found=type_name(learn))
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return _("'weight' must be a number, found {found}.", found=type_name(weight))
    if not 0 <= weight <= MAX_WEIGHT:  # False for NaN, too
        return _("'weight' must be between 0 and {most}, found {weight}.", most=MAX_WEIGHT, weight=str(weight)[:40])
    return None
