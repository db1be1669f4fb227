"""How much text one token can stand for: what is longer than a prompt may be is seen before it is tokenised."""

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPOSED = 3  # bytes of text that NFC makes one of, at most: three letters of Hangul become a syllable
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_known: "WeakKeyDictionary[PreTrainedTokenizerBase, int | None]" = WeakKeyDictionary()


def bytes_of_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """UTF-8 bytes of text that a token stands for at most; None where a tokenizer may leave text out.

    So a text of more than n times as many bytes has more than n tokens.
    """
    if tokenizer not in _known:
        _known[tokenizer] = _look(tokenizer)
    return _known[tokenizer]


def _look(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    if not tokenizer.is_fast:
        return None
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    shrinks = _shrinks(parts["normalizer"])
    eats_blanks = any(token["lstrip"] or token["rstrip"] for token in added)
    if model["type"] != "BPE" or shrinks is None or eats_blanks or not _keeps(parts["pre_tokenizer"]):
        return None
    vocabulary = model["vocab"].keys()
    if model.get("byte_fallback") and vocabulary >= _BYTES:
        longest = max(len(token.encode()) for token in vocabulary)
    elif _is_byte_level(parts["pre_tokenizer"]) and vocabulary >= set(ByteLevel.alphabet()):
        longest = max(map(len, vocabulary))  # a letter of this alphabet is a byte
    else:
        return None
    return int(shrinks * max([longest, *(len(token["content"].encode()) for token in added)]))


def _pieces(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A part of the pipeline, or those of a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [piece for one in part.get("normalizers", part.get("pretokenizers", ())) for piece in _pieces(one)]


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """How many bytes become one at most; None where nobody knows."""
    factor = 1
    for piece in _pieces(normalizer):
        if piece["type"] == "NFC":
            factor = COMPOSED
        elif piece["type"] != "Prepend" and (piece["type"], piece.get("pattern")) != ("Replace", {"String": " "}):
            return None
    return factor


def _keeps(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether it cuts and leaves nothing out."""
    kinds = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}
    return all(p["type"] in kinds and p.get("behavior") != "Removed" for p in _pieces(pre_tokenizer))


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    return any(piece["type"] == "ByteLevel" for piece in _pieces(pre_tokenizer))
