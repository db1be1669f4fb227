"""A byte-level BPE tokenizer as GGUF stores it, and its token ids as they follow from a file.

GGUF names the rules by which text is split before BPE; each program has its own table of these names. `SPLITS` is that
of llama.cpp. The name is found from the tokenizer's rules, and `from_file` makes a tokenizer from what is in a file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lorasmith.errors import ModelError
from lorasmith.i18n import _
from lorasmith.loading.tokenizer_file import TEXTS

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


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a byte-level BPE tokenizer: its tokens by id, their types, merges and splits."""

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    pre: str


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the `rows` of the embedding.

    Raises ModelError if it is not byte-level BPE, or splits text by rules for which GGUF has no name.
    """
    parts = _parts(tokenizer)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i] = added.content
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in parts["model"]["merges"]]
    ids = range(max(rows, max(tokens) + 1))
    return Vocabulary(
        [tokens.get(i, f"[PAD{i}]") for i in ids],
        [int(types.get(i, TokenType.UNUSED)) for i in ids],
        merges,
        _pre_tokenizer(tokenizer, parts),
    )


def from_file(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer made only of what a file says, and of llama.cpp's table of the rules that it names."""
    _patterns, whole_words = SPLITS[vocabulary.pre]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=whole_words))  # type: ignore[arg-type]
    core.pre_tokenizer = _splitter(vocabulary.pre)
    core.decoder = decoders.ByteLevel()
    for kind, is_special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
        core.add_tokens([AddedToken(t, normalized=False, special=is_special) for t, own in pairs if own == kind])
    return core


def _splitter(name: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name][0]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])


def compared_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of many kinds, except those that the tokenizer normalizes first, which llama.cpp does not do."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return [text for text in TEXTS if normalizer is None or normalizer.normalize_str(text) == text]


def first_other_text(tokenizer: PreTrainedTokenizerBase, other: Tokenizer) -> str | None:
    """The first of `compared_texts` that the two split otherwise, or give other token ids; None if there is none."""
    own = tokenizer.backend_tokenizer.pre_tokenizer
    for text in compared_texts(tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        splits = (one.pre_tokenize_str(text) for one in (own, other.pre_tokenizer))
        if ids != other.encode(text, add_special_tokens=False).ids or next(splits) != next(splits):
            return text
    return None


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if isinstance(backend, Tokenizer) else {}
    if parts.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(parts.get("pre_tokenizer")):
        raise ModelError(
            _(
                "The tokenizer ({kind}) is not byte-level BPE, and only such tokenizers can be exported to GGUF yet. "
                "Use lorasmith merge, and convert the folder with llama.cpp's convert_hf_to_gguf.py.",
                kind=type(tokenizer).__name__,
            )
        )
    return parts


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any]) -> str:
    """The name of rules that give the tokenizer's ids, for text of many kinds."""
    own = tokenizer.backend_tokenizer.pre_tokenizer
    texts = compared_texts(tokenizer)
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
