"""Contents of messages: a text, or a list of parts as OpenAI, Anthropic and LLaMA-Factory write them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorasmith.data.rows.calls import are_calls, listed_calls
from lorasmith.data.rows.conversation import quoted, type_name
from lorasmith.data.rows.marks import DETAILS, MARKS, WEIGHTS, Spans, exclusions, marks_problem
from lorasmith.i18n import _

TEXT = ("text", "input_text", "output_text")
REASONING = ("thinking", "reasoning")
CALL = ("tool_use", "tool_call", "function_call")
RESULT = ("tool_result",)
_CALL_KEYS = MARKS | {"type", "id", "name", "function", "arguments", "parameters", "input", "text", "value", *CALL}
MEDIA_TAGS = ("<image>", "<video>", "<audio>")  # where other programs insert what stands in a column beside the text


@dataclass(frozen=True)
class Content:
    """What a content holds.

    results: of function calls, each with the id of its call, as in Anthropic's files. masked: the spans of the text
    that are not trained on, because their parts are marked so, as in Axolotl's files.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[dict[str, object], ...] = ()
    results: tuple[tuple[str | None, "Content"], ...] = ()
    masked: Spans = ()


def parse_content(content: object) -> Content:
    """A content in which `content_problem` found nothing wrong. Texts are joined as they are, as chat templates do."""
    if isinstance(content, dict):
        return Content(json.dumps(content, ensure_ascii=False))
    if not isinstance(content, list):
        return Content(str(content or ""))
    parts = [part for part in content if isinstance(part, dict)]
    calls = [call for part in parts if part.get("type") in CALL for call in _calls(part)]
    results = [
        (part.get("tool_use_id"), parse_content(part.get("content"))) for part in parts if part.get("type") in RESULT
    ]
    return Content(_joined(parts, TEXT), _joined(parts, REASONING), tuple(calls), tuple(results), _masked(parts))


def content_problem(key: str, content: object) -> str | None:
    """Why the list of parts under `key` cannot be used, as a sentence; None if it can be, or is a text."""
    for number, part in enumerate(content, 1) if isinstance(content, list) else ():
        if (text := _part_problem(part)) is not None:
            return _("'{key}': part {number} {problem}", key=key, number=number, problem=text)
    return None


def unread_part_keys(content: object) -> set[str]:
    """The keys that nobody reads of the parts in a content, such as 'cache_control'."""
    found = set[str]()
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            found |= {key for key, value in part.items() if value is not None} - _read_keys(str(part.get("type")))
            found |= unread_part_keys(part.get("content")) if part.get("type") in RESULT else set()
    return found


def reasoning_part(content: object) -> str | None:
    """The type of the first part of a content that holds a reasoning; None if there is none."""
    parts = content if isinstance(content, list) else ()
    return next((part["type"] for part in parts if part["type"] in REASONING and _value(part)), None)


def part_marks(content: object) -> Iterable[Mapping[str, object]]:
    """The parts of a content that have a mark of what is trained on."""
    parts = content if isinstance(content, list) else ()
    return [part for part in parts if isinstance(part, dict) and not MARKS.isdisjoint(part)]


def unsupported_part(content: object) -> str | None:
    """The type of the first part that is more than text, such as 'image_url'; None if there is none.

    content: one in which `content_problem` found nothing wrong.
    """
    for part in content if isinstance(content, list) else ():
        kind = part["type"]
        if kind not in (*TEXT, *REASONING, *CALL, *RESULT):
            return str(kind)
        if kind in RESULT and (inner := unsupported_part(part.get("content"))):
            return inner
    return None


def media_tag(text: str) -> str | None:
    """The tag in a question that stands for an image, a video or audio; None if there is none.

    <video> and <audio> are also tags of HTML, so they count only at the beginning or the end.
    """
    bare = text.strip()
    for tag in MEDIA_TAGS:
        if bare.startswith(tag) or bare.endswith(tag) or (tag == "<image>" and tag in text):
            return tag
    return None


def _joined(parts: list[dict[str, object]], types: tuple[str, ...]) -> str:
    return "".join(str(_value(part) or "") for part in parts if part.get("type") in types)


def _masked(parts: list[dict[str, object]]) -> Spans:
    """The spans of the joined text that come from parts that are not trained on."""
    spans, end = list[tuple[int, int]](), 0
    for part in parts:
        if part.get("type") in TEXT:
            start, end = end, end + len(str(_value(part) or ""))
            if exclusions(part) and start < end:
                spans.append((start, end))
    return tuple(spans)


def _read_keys(kind: str) -> frozenset[str]:
    if kind in CALL:
        return _CALL_KEYS
    return MARKS | {"type", "tool_use_id", "content"} if kind in RESULT else MARKS | {"type", "text", "value", kind}


def _value(part: Mapping[str, object]) -> object:
    """The text of a part: OpenAI's under `text`, Anthropic's under the name of the type, LLaMA-Factory's `value`."""
    return next((part[key] for key in ("text", str(part.get("type")), "value") if part.get(key) is not None), None)


def _calls(part: Mapping[str, object]) -> list[dict[str, object]]:
    return [dict(part)] if "name" in part else listed_calls(_value(part))


def _part_problem(part: object) -> str | None:
    example = '{"type": "text", "text": ...}'
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return _("must look like {example}, found {found}.", example=example, found=type_name(part))
    kind = part["type"]
    if kind in (*TEXT, *REASONING) and not isinstance(_value(part), str):
        found = quoted(part) if _value(part) is None else type_name(_value(part))
        return _("must look like {example}, found {found}.", example=example.replace("text", kind), found=found)
    if kind in RESULT and (text := content_problem("content", part.get("content"))):
        return text
    if kind in CALL and not (_calls(part) and are_calls(_calls(part))):
        return _(
            "must be a function call, such as {example}.", example='{"type": "tool_use", "name": ..., "input": {...}}'
        )
    return None if MARKS.isdisjoint(part) else _marks_problem(part)


def _marks_problem(part: Mapping[str, object]) -> str | None:
    """What is wrong with the marks of a part: of a text it can only be said whether it is trained on."""
    text = marks_problem({key: value for key, value in part.items() if key not in DETAILS}, 0)
    if text is not None:
        return _("is marked in a way that cannot be used: {problem}", problem=text)
    partly = [key for key in WEIGHTS if part.get(key) not in (None, 0, 1)]
    partly += [key for key in DETAILS if part.get(key) is not None]
    if part["type"] not in TEXT:
        partly += exclusions(part)
    if not partly:
        return None
    return _(
        "has '{key}': {value}, but a part can only be trained on or not, and only if it is text. Put the mark on the "
        "message.",
        key=partly[0],
        value=json.dumps(part[partly[0]])[:40],
    )
