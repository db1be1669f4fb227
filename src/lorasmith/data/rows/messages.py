"""Parse and check lists of messages: OpenAI's keys `role` and `content`, ShareGPT's `from` and `value`, or pairs.

data/rows/styles.py says which keys and roles there are, parts.py what a content may hold, calls.py and marks.py read
the function calls and the marks of what is trained on.
"""

from collections.abc import Iterator
from difflib import get_close_matches

from lorasmith.data.rows.calls import are_calls, listed_calls, parse_call
from lorasmith.data.rows.cells import json_problem
from lorasmith.data.rows.conversation import Message, quoted, type_name
from lorasmith.data.rows.marks import (
    MARKS,
    exclusions,
    is_learned,
    marks_problem,
    masked_spans,
    wants_training,
    weight_of,
)
from lorasmith.data.rows.parts import (
    Content,
    content_problem,
    media_tag,
    parse_content,
    part_marks,
    reasoning_part,
    unread_part_keys,
    unsupported_part,
)
from lorasmith.data.rows.styles import (
    CALL,
    CONTENT_KEYS,
    OPENAI,
    ROLE_KEYS,
    MessageStyle,
    detect_style,
    expand_pairs,
    unread_keys,
)
from lorasmith.i18n import _

CALL_KEYS = ("tool_calls", "function_call")  # the second is OpenAI's older one, for a single call
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MESSAGE_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *CALL_KEYS, *REASONING_KEYS, *MARKS, "tool_call_id", "name"))


def parse_messages(messages: list[dict[str, object]]) -> tuple[Message, ...]:
    """The messages of a list in which `messages_problem` found nothing wrong.

    A message that is a function call continues the answer or the call before it: a template renders them as one.
    """
    expanded = expand_pairs(list(messages))
    style, found = detect_style(expanded), list[Message]()
    for message in expanded:
        for one in _parsed(message, style):
            if found and style.role_of(message) == CALL and _same_answer(found[-1], one):
                reasoning = found[-1].reasoning + one.reasoning
                found[-1] = found[-1]._replace(tool_calls=found[-1].tool_calls + one.tool_calls, reasoning=reasoning)
            else:
                found.append(one)
    return tuple(found)


def messages_problem(key: str, messages: object) -> str | None:
    """Why the messages under `key` are invalid or have no answer to train on, as a sentence; else None."""
    if messages in ("", []):
        return _("'{key}' is empty, so there is nothing to train on. Add messages, or remove the row.", key=key)
    if isinstance(messages, str) and (text := json_problem(key, messages)):
        return text
    if not isinstance(messages, list):
        return _("'{key}' must be a list of messages, found {found}.", key=key, found=type_name(messages))
    expanded = expand_pairs(messages)
    style = detect_style(expanded)
    for number, message in enumerate(expanded, 1):
        text = _message_problem(number, message, style)
        if text is not None:
            return text
    answers = [one for one in expanded if isinstance(one, dict) and style.role_of(one) in ("assistant", CALL)]
    if not answers:
        return _(
            "no message has the role {name}, so there is nothing to train on. Add an answer, or remove the row.",
            name=quoted([style.answer]),
        )
    if not any(_is_learned(one, parse_content(one.get(style.content))) and weight_of(one) for one in answers):
        return _(
            "every answer is marked not to be trained on ({marks}), so there is nothing to train on. Remove the row.",
            marks=quoted(
                dict.fromkeys(
                    mark
                    for answer in answers
                    for marked in (answer, *part_marks(answer.get(style.content)))
                    for mark in exclusions(marked)
                )
            ),
        )
    return None


def unread_message_keys(messages: object) -> set[str]:
    """The keys that nobody reads of the messages in a list; a reasoning that is not text is not read either."""
    found = set[str]()
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and len(message) > 2:
            found |= unread_keys(message, MESSAGE_KEYS)
            found |= {key for key in REASONING_KEYS if not isinstance(message.get(key), str | None)}
        for key in CONTENT_KEYS if isinstance(message, dict) else ():
            if isinstance(message.get(key), list):
                found |= {f"{key}.{inner}" for inner in unread_part_keys(message[key])}
    return found


def marks_prompts(messages: object) -> bool:
    """Whether a message that is not an answer is marked to be trained on."""
    expanded = expand_pairs(messages) if isinstance(messages, list) else []
    style = detect_style(expanded)
    return any(
        style.role_of(message) not in ("assistant", CALL) and wants_training(marked)
        for message in expanded
        if isinstance(message, dict)
        for marked in (message, *part_marks(message.get(style.content)))
    )


def _parsed(message: object, style: MessageStyle) -> Iterator[Message]:
    """The messages of one: results of function calls that are parts of its content are messages of their own."""
    assert isinstance(message, dict)
    role, value = style.role_of(message) or "", message.get(style.content)
    if isinstance(value, str) and _is_plain(message, role, value):
        yield Message(role, value)
        return
    content = parse_content("" if role == CALL else value)
    calls = [*content.calls, *(call for key in CALL_KEYS for call in listed_calls(message.get(key)))]
    calls += listed_calls(value) if role == CALL else []
    weight = weight_of(message)
    for call_id, result in content.results:
        learn = _is_learned(message, result)
        yield Message("tool", result.text, (), _optional(call_id), None, learn, weight, masked=result.masked)
    if content.results and not content.text:
        return
    yield Message(
        "assistant" if role == CALL else role,
        content.text,
        tuple(map(parse_call, calls)),
        _optional(message.get("tool_call_id")),
        _optional(message.get("name")),
        _is_learned(message, content),
        weight,
        _reasoning(message) or content.reasoning,
        masked_spans(message, len(content.text), content.masked),
    )


def _is_learned(message: dict[str, object], content: Content) -> bool:
    """Whether anything of the message is trained on: no mark excludes it, nor each of the parts that it consists of."""
    is_more = bool(content.reasoning or content.calls or _reasoning(message) or _has_calls(message))
    left = len(content.text) - sum(stop - start for start, stop in content.masked)
    return is_learned(message) and (is_more or left > 0 or not content.masked)


def _is_plain(message: dict[str, object], role: str, value: object) -> bool:
    """Whether there is nothing but a role and a text, as in most messages, so that nothing else has to be looked at."""
    return len(message) == 2 and isinstance(value, str) and role != CALL


def _same_answer(before: Message, call: Message) -> bool:
    return before.role == "assistant" and (before.learn, before.weight) == (call.learn, call.weight)


def _optional(value: object) -> str | None:
    return None if value is None else str(value)


def _reasoning(message: dict[str, object]) -> str:
    texts = (message.get(key) for key in REASONING_KEYS)
    return next((text for text in texts if isinstance(text, str) and text), "")


def _message_problem(number: int, message: object, style: MessageStyle) -> str | None:
    if not isinstance(message, dict):
        return _(
            "message {number} must be an object with '{role}' and '{content}', found {found}.",
            number=number,
            role=style.role,
            content=style.content,
            found=type_name(message),
        )
    wanted = (style.role,) if _has_calls(message) else (style.role, style.content)
    missing = [key for key in wanted if key not in message]
    if missing:
        return _(
            "message {number} has no '{key}', only {found}. A message looks like {example}.",
            number=number,
            key=missing[0],
            found=quoted(message),
            example=f'{{"{style.role}": ..., "{style.content}": ...}}',
        )
    role = style.role_of(message)
    if role is None:
        return _role_problem(number, message[style.role], style)
    text = _content_problem(message, role, style)
    if not _is_plain(message, role, message.get(style.content)):
        text = text or _calls_problem(message, role, style) or _reasoning_problem(message, role, style)
        text = text or _marks_problem(message, role, style)
    return text and _("message {number} ({role}): {problem}", number=number, role=message[style.role], problem=text)


def _role_problem(number: int, name: object, style: MessageStyle) -> str:
    text = _(
        "message {number} has the unknown role {role}; supported roles are {known}.",
        number=number,
        role=repr(name),
        known=quoted(style.shown),
    )
    near = get_close_matches(str(name).lower(), list(style.roles), 1, 0.75)
    if near:
        return text + " " + _("Did you mean '{near}'?", near=near[0])
    return text + " " + _("If it is one of them, say which: --roles {name}=user.", name=name)


def _content_problem(message: dict[str, object], role: str, style: MessageStyle) -> str | None:
    content = message.get(style.content)
    if role == CALL or (content is None and _has_calls(message)):
        return None  # `_calls_problem` looks at it
    if not isinstance(content, (str | list | dict) if role == "tool" else (str | list)):
        return _("'{key}' must be text, found {found}.", key=style.content, found=type_name(content))
    if (text := content_problem(style.content, content)) is not None:
        return text
    if kind := unsupported_part(content):
        return not_text(_("a part of type {type}", type=repr(kind)))
    parsed = parse_content(content)
    if role == "user" and (tag := media_tag(parsed.text)):
        return not_text(tag)
    if role == "assistant" and not parsed.text.strip() and not parsed.calls and not _has_calls(message):
        return _("the message is empty, so there is nothing to train on. Add an answer, or remove the row.")
    return None


def not_text(what: str) -> str:
    """The sentence for a row that holds something else than text."""
    return _(
        "found {what}, but only text can be trained on, and the model would not see it. Remove such rows, or leave "
        "them out with data.skip_bad_rows.",
        what=what,
    )


def _has_calls(message: dict[str, object]) -> bool:
    return any(message.get(key) for key in CALL_KEYS)


def _calls_problem(message: dict[str, object], role: str, style: MessageStyle) -> str | None:
    if role == CALL:
        calls = listed_calls(message.get(style.content))
        if not calls or not are_calls(calls):
            return _(
                "the text must be a function call in JSON, such as {example}. For the result of a function, "
                "use the role '{role}'.",
                example='{"name": ..., "arguments": {...}}',
                role="tool" if style.role == OPENAI.role else "observation",
            )
    for key in CALL_KEYS:
        calls = listed_calls(message.get(key))
        if calls and role not in ("assistant", CALL):
            return _("only an assistant message can have '{key}'.", key=key)
        if not are_calls(calls):
            return _(
                "'{key}' must look like {example}; the arguments are an object, or the same as a JSON string.",
                key=key,
                example='[{"function": {"name": ..., "arguments": {...}}}]',
            )
    if role not in ("assistant", CALL) and parse_content(message.get(style.content)).calls:
        return _("only an assistant message can have function calls.")
    return None


def _reasoning_problem(message: dict[str, object], role: str, style: MessageStyle) -> str | None:
    texts = {key: message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key]}
    content = message.get(style.content)
    if role != CALL and (kind := reasoning_part(content)):
        texts[f"{style.content}.{kind}"] = parse_content(content).reasoning
    if texts and role not in ("assistant", CALL):
        return _("only an assistant message can have '{key}'.", key=next(iter(texts)))
    if len(set(texts.values())) > 1:
        return _("the keys {keys} hold different texts. Keep one of them.", keys=quoted(texts))
    return None


def _marks_problem(message: dict[str, object], role: str, style: MessageStyle) -> str | None:
    text = "" if role == CALL else parse_content(message.get(style.content)).text
    return marks_problem(message, len(text))
