"""What a chat template does with generation prompts, reasoning and function calls.

It is found by rendering test conversations. Templates do not declare these things, and to read them out of the Jinja
would be guessing. So each is tried once per template.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasmith.data.rows.conversation import RowError
from lorasmith.data.rows.messages import REASONING_KEYS

Render = Callable[[list[dict[str, Any]], bool, "Behavior"], str]  # messages, whether with the generation prompt -> text

INLINE = "inline"  # reasoning within the content, between <think> and </think>

_USER = {"role": "user", "content": "quser0z"}
_ANSWERS = ("lorasmith", "Xanswer")  # they differ in their first character
_CALL = {"name": "qcall0z", "arguments": {"qkey0z": "qvalue0z"}}
_DICT = "{'qkey0z'"  # how Jinja writes an object that the template puts out as it is


@dataclass(frozen=True)
class Behavior:
    """What a template does.

    dropped: the end of its generation prompt that it does not render before an answer, such as an opened or an empty
    thought; empty for most templates. header: what it renders before an answer, if its generation prompt is another
    text, or if it has none. reasoning: the key of a message by which it shows the reasoning, or 'inline', or None if it
    never shows it. text_arguments: whether it expects the arguments of function calls as JSON text and not as an
    object. parts: whether it expects contents as lists of parts. no_tools: what it expects as the tools of a
    conversation that has none.
    """

    dropped: str = ""
    header: str = ""
    reasoning: str | None = None
    text_arguments: bool = False
    parts: bool = False
    no_tools: tuple[()] | None = None


def find_behavior(render: Render, special: Sequence[str]) -> Behavior:
    """The behavior of a template. special: the texts of the tokenizer's added tokens."""
    found = _form(render)

    def text(messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return render(messages, prompt, found)

    dropped, header = _opening(text, special)
    return replace(
        found, dropped=dropped, header=header, reasoning=_reasoning(text), text_arguments=_text_arguments(text)
    )


def _form(render: Render) -> Behavior:
    """The form of contents and tools in which the template shows a message."""
    forms = (Behavior(), Behavior(parts=True), Behavior(no_tools=()))
    return next((form for form in forms if _shows_user(render, form)), forms[0])


def _shows_user(render: Render, form: Behavior) -> bool:
    try:
        return _USER["content"] in render([_USER], False, form)
    except RowError:
        return False


def _opening(text: Callable[..., str], special: Sequence[str]) -> tuple[str, str]:
    """`dropped` and `header` of a template."""
    answers = [{"role": "assistant", "content": answer} for answer in _ANSWERS]
    try:
        bare, prompt = text([_USER]), text([_USER], True)
        wholes = [text([_USER, answer]) for answer in answers]
        longer = text([_USER, answers[0], _USER])
    except RowError:
        return "", ""
    header = wholes[0][len(bare) : common_length(wholes)] if wholes[0].startswith(bare) else ""
    always_prompts = prompt == bare and not longer.startswith(wholes[0])
    same = common_length([prompt, *wholes])
    if same == len(prompt):
        has_none = prompt == bare and not always_prompts and bool(header.strip())
        blanks = prompt[len(prompt.rstrip(" ")) :]  # tokenizers merge them with the answer
        return ("", header) if has_none else (blanks, "")
    end = min(_boundary(one, same, special) for one in (prompt, *wholes))
    user_end = prompt.rfind(_USER["content"]) + len(_USER["content"])
    start = user_end if always_prompts else common_length([bare, prompt])
    has_common_header = bool(prompt[start:end].strip())
    return (prompt[end:], "") if has_common_header else ("", header)


def _boundary(text: str, at: int, special: Sequence[str]) -> int:
    """`at`, or the start of the added token, tag or word of `text` that it would cut in two."""
    for token in special:
        for start in range(max(0, at - len(token) + 1), at):
            if text.startswith(token, start):
                return start
    cut = re.search(r"(?:<[^<>\s]*|\w+)\Z", text[:at])
    is_within = cut and (cut[0].startswith("<") or text[at : at + 1].isalnum())
    return cut.start() if cut and is_within else at


def common_length(texts: Sequence[str]) -> int:
    """The number of characters that all texts begin with."""
    shortest = min(texts, key=len)
    return next((i for i, mark in enumerate(shortest) if any(text[i] != mark for text in texts)), len(shortest))


def _reasoning(text: Callable[..., str]) -> str | None:
    thought, answer = "qthought0z", "qanswer0z"

    def shows(**message: str) -> bool:
        try:
            shown = text([_USER, {"role": "assistant", **message}])
        except RowError:
            return False
        is_once = shown.count(thought) == shown.count(answer) == 1 and shown.count("</think>") <= 1
        return is_once and shown.index(thought) < shown.index(answer)

    for key in REASONING_KEYS:
        if shows(content=answer, **{key: thought}):
            return key
    return INLINE if shows(content=inline(thought, answer)) else None


def inline(reasoning: str, answer: str) -> str:
    """Reasoning and answer as one text, in the form that most models write."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def _text_arguments(text: Callable[..., str]) -> bool:
    """Whether function calls are right with arguments as JSON text, and not as an object."""

    def shown(call: dict[str, Any]) -> str:
        entry = {"id": "callq0000", "type": "function", "function": call}
        try:
            return text([_USER, {"role": "assistant", "content": "", "tool_calls": [entry]}])
        except RowError:
            return _DICT

    if _DICT not in shown(_CALL):
        return False
    written = json.dumps(_CALL["arguments"])
    return written in shown(_CALL | {"arguments": written})
