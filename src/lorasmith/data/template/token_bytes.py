"""Lower bounds on the number of tokens of a text, to reject long prompts without tokenizing them."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 8  # times as many bytes as tokens
PIECE = 2**14  # characters that are divided at once
COMPOSED = 3  # the most that NFC shrinks a text: three Hangul letters become one syllable
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, int | None]" = WeakKeyDictionary()
_letters: "WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[str]]" = WeakKeyDictionary()


def max_bytes_per_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The most UTF-8 bytes of text that a token can represent; None if the tokenizer may drop text.

    A text of more than n times as many bytes has more than n tokens.
    """
    if tokenizer not in _known:
        _known[tokenizer] = _compute(tokenizer)
    return _known[tokenizer]


def least_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], enough: int) -> int:
    """A lower bound on the number of tokens of texts that are tokenized separately; it may stop above `enough`.

    Very long texts are divided into words up to there, which is much faster than to tokenize them: with byte-level BPE,
    each word is at least one token. 0 if nothing is known.
    """
    size, most = sum(len(text.encode()) for text in texts), max_bytes_per_token(tokenizer)
    least = -(-size // most) if most else 0
    if least > enough or size <= LONG * enough:
        return least
    words = 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            words += max(0, _words(tokenizer, text[start : start + PIECE]) - 1)  # the cut may divide one
            if words > enough:
                return words
    return max(least, words)


def _words(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    """The number of words into which byte-level BPE divides a text; 0 for other tokenizers.

    Not counted are added tokens, and words of which the vocabulary has no byte: nothing may be left of them.
    """
    if tokenizer not in _letters:
        _letters[tokenizer] = _letters_of(tokenizer)
    letters = _letters[tokenizer]
    if not letters:
        return 0
    core: Tokenizer = tokenizer.backend_tokenizer
    added = "|".join(re.escape(token) for token in tokenizer.get_added_vocab())
    parts = re.split(added, text) if added else [text]
    normal = parts if core.normalizer is None else [core.normalizer.normalize_str(part) for part in parts]
    words = (word for part in normal for word, _span in core.pre_tokenizer.pre_tokenize_str(part))
    return sum(1 for word in words if not letters.isdisjoint(word))


def _letters_of(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """The letters of the byte-level alphabet that the vocabulary has; none for another kind of tokenizer."""
    if not tokenizer.is_fast:
        return frozenset()
    core: Tokenizer = tokenizer.backend_tokenizer
    if not isinstance(core.model, BPE) or not _is_byte_level(json.loads(core.to_str())["pre_tokenizer"]):
        return frozenset()
    return frozenset(letter for letter in ByteLevel.alphabet() if core.token_to_id(letter) is not None)


def _compute(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    if not tokenizer.is_fast:
        return None
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    shrinks = _shrinks(parts["normalizer"])
    strips_spaces = any(token["lstrip"] or token["rstrip"] for token in added)
    if model["type"] != "BPE" or shrinks is None or strips_spaces or not _keeps(parts["pre_tokenizer"]):
        return None
    vocabulary = model["vocab"].keys()
    if model.get("byte_fallback") and vocabulary >= _BYTES:
        longest = max(len(token.encode()) for token in vocabulary)
    elif _is_byte_level(parts["pre_tokenizer"]) and vocabulary >= set(ByteLevel.alphabet()):
        longest = max(map(len, vocabulary))  # in this alphabet, one letter is one byte
    else:
        return None
    return int(shrinks * max([longest, *(len(token["content"].encode()) for token in added)]))


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with nested sequences flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for one in part.get("normalizers", part.get("pretokenizers", ())) for step in _steps(one)]


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """The most bytes that the normalizer turns into one; None if that is not known."""
    factor = 1
    for step in _steps(normalizer):
        if step["type"] == "NFC":
            factor = COMPOSED
        elif step["type"] != "Prepend" and (step["type"], step.get("pattern")) != ("Replace", {"String": " "}):
            return None
    return factor


def _keeps(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer splits text without dropping any."""
    kinds = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}
    return all(p["type"] in kinds and p.get("behavior") != "Removed" for p in _steps(pre_tokenizer))


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer))
