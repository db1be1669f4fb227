"""Special tokens that stand in the contents of messages, such as <|im_end|> in a user's text.

A chat template puts contents between its own special tokens, so a content that spells one could end its turn, or begin
another. Such spellings are encoded as ordinary text. To tell them from the template's own, a mark is put into each
before the template is rendered, and texts are cut at the marks when they are tokenized.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorasmith.data.rows.conversation import Message
from lorasmith.data.template.chat_template import split_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"  # a noncharacter of Unicode, which no text contains


def special_tokens(tokenizer: "PreTrainedTokenizerBase", stops: Iterable[int] = ()) -> re.Pattern[str] | None:
    """A pattern of the special tokens of a tokenizer, and of its added tokens among `stops`; None if there are none."""
    added, stops = tokenizer.added_tokens_decoder, set(stops)
    texts = {token.content for i, token in added.items() if token.special or i in stops}
    texts |= set(tokenizer.all_special_tokens)
    ordered = sorted((text for text in texts if len(text) > 1 and text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def count_special(messages: Sequence[Message], pattern: re.Pattern[str] | None) -> int:
    """How many special tokens the contents and the function calls of `messages` spell."""
    if pattern is None:
        return 0
    found = sum(len(pattern.findall(text)) for message in messages for text in (message.content, message.reasoning))
    calls = [call for message in messages for call in message.tool_calls]
    return found + (len(pattern.findall(json.dumps(calls, ensure_ascii=False))) if calls else 0)


def as_text(messages: Sequence[Message], pattern: re.Pattern[str] | None) -> Sequence[Message]:
    """The messages with a mark in every special token that they spell.

    The tags around the reasoning of an answer are special tokens of some models. They are not part of what it spells.
    """
    if pattern is None or not count_special(messages, pattern):
        return messages
    return [_as_text(message, pattern) for message in messages]


def _as_text(message: Message, pattern: re.Pattern[str]) -> Message:
    reasoning, answer = split_reasoning(message)
    if not pattern.search("<think></think>"):
        reasoning, answer = message.reasoning, message.content
    return message._replace(
        content=marked(answer, pattern),
        reasoning=marked(reasoning, pattern),
        tool_calls=tuple(marked(call, pattern) for call in message.tool_calls),
    )


def marked(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """A text, or the texts in a value of JSON, with a mark in every special token that they spell."""
    if pattern is None:
        return value
    if isinstance(value, str):
        return pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
    if isinstance(value, dict):
        return {key: marked(inner, pattern) for key, inner in value.items()}
    return [marked(inner, pattern) for inner in value] if isinstance(value, list | tuple) else value


def ids_of_plain_text(tokenizer: "PreTrainedTokenizerBase", text: str, adds_special: bool = True) -> list[int]:
    """Token ids of a text as the tokenizer alone encodes it; one that begins with the BOS token gets no second one."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    ids: list[int] = tokenizer(text, add_special_tokens=adds_special and not has_bos, verbose=False)["input_ids"]
    return ids


def without_marks(text: str) -> str:
    """The text as the user wrote it."""
    return text.replace(MARK, "")
