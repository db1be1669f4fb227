"""A byte-level BPE tokenizer as GGUF stores it, and its token ids as they follow from a file.

GGUF names the rules by which text is split before BPE; each program has its own table of these names. `SPLITS` is that
of llama.cpp. The name is found from the tokenizer's rules.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from lorasmith.errors import ModelError
from lorasmith.i18n import _

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name: (the patterns, one after the other; whether a word that is a token is taken without merging)
SPLITS: Mapping[str, tuple[Sequence[str], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "llama-bpe": ((LLAMA3,), True),
    "dbrx": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "tekken": ((TEKKEN,), True),
}


def is_byte_level(parts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    return parts.get("model", {}).get("type") == "BPE" and "ByteLevel" in json.dumps(parts.get("pre_tokenizer"))


def pre_tokenizer_of(parts: Mapping[str, Any], own: pre_tokenizers.PreTokenizer, texts: Sequence[str]) -> str:
    """The name of rules that split these texts as the tokenizer does. Raises ModelError if there is none."""
    for name, (_patterns, whole_words) in SPLITS.items():
        rules = _splitter(name)
        if whole_words == bool(parts["model"].get("ignore_merges")) and all(
            own.pre_tokenize_str(text) == rules.pre_tokenize_str(text) for text in texts
        ):
            return name
    raise ModelError(
        _(
            "The tokenizer splits text by rules for which GGUF has no name that lorasmith knows ({rules}). Use "
            "lorasmith merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py.",
            rules=json.dumps(parts["pre_tokenizer"], ensure_ascii=False)[:200],
        )
    )


def merges_of(parts: Mapping[str, Any]) -> list[str]:
    """The merges, each as two tokens with a space between them."""
    return [one if isinstance(one, str) else " ".join(one) for one in parts["model"]["merges"]]


class ByteLevel:
    """Token ids that follow from what a file says, and from llama.cpp's table of the rules that it names."""

    def __init__(self, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> None:
        whole_words = SPLITS[pre][1]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words)  # type: ignore[arg-type]
        self.core = Tokenizer(model)
        self.core.pre_tokenizer = _splitter(pre)
        self.core.decoder = decoders.ByteLevel()
        for kind, is_special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
            own = [token for token, found in zip(tokens, types, strict=True) if found == kind]
            self.core.add_tokens([AddedToken(token, normalized=False, special=is_special) for token in own])

    def ids(self, text: str) -> list[int]:
        """The ids of a text in which special tokens count."""
        return list(self.core.encode(text, add_special_tokens=False).ids)

    def splits_like(self, other: pre_tokenizers.PreTokenizer, text: str) -> bool:
        """Whether the text is split as `other` splits it, which the ids do not tell if no merge crosses a border."""
        assert self.core.pre_tokenizer is not None
        return bool(other.pre_tokenize_str(text) == self.core.pre_tokenizer.pre_tokenize_str(text))


def _splitter(name: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name][0]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])
