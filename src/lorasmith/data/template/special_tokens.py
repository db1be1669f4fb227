"""Special tokens that stand in the contents of messages, such as <|im_end|> in a user's text.

A chat template puts contents between its own special tokens, so a content that spells one could end its turn, or begin
another. Such spellings are encoded as ordinary text. To tell them from the template's own, a mark is put into each
before the template is rendered, and texts are cut at the marks when they are tokenized.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lorasmith.data.rows.conversation import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"  # a noncharacter of Unicode, which no text contains
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, re.Pattern[str] | None]" = WeakKeyDictionary()


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """A pattern of all special tokens of a tokenizer; None if it has none."""
    if tokenizer not in _known:
        added = tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special and len(token.content) > 1}
        texts |= {text for text in tokenizer.all_special_tokens if len(text) > 1}
        ordered = sorted(texts, key=len, reverse=True)
        _known[tokenizer] = re.compile("|".join(map(re.escape, ordered))) if ordered else None
    return _known[tokenizer]


def count_special(messages: Sequence[Message], pattern: re.Pattern[str] | None) -> int:
    """How many special tokens the contents of `messages` spell."""
    if pattern is None:
        return 0
    return sum(len(pattern.findall(text)) for message in messages for text in (message.content, message.reasoning))


def as_text(messages: Sequence[Message], pattern: re.Pattern[str] | None) -> Sequence[Message]:
    """The messages with a mark in every special token that their contents spell."""
    if not count_special(messages, pattern):
        return messages
    return [m._replace(content=_marked(m.content, pattern), reasoning=_marked(m.reasoning, pattern)) for m in messages]


def _marked(text: str, pattern: re.Pattern[str] | None) -> str:
    return pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text) if pattern else text


def ids_of_plain_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text as the tokenizer alone encodes it; one that begins with the BOS token gets no second one."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    ids: list[int] = tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
    return ids


def without_marks(text: str) -> str:
    """The text as the user wrote it."""
    return text.replace(MARK, "")
