"""A tokenizer as GGUF stores it, and its token ids as they follow from a file: see `byte_level`, `sentencepiece`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lorasmith.errors import ModelError
from lorasmith.export.gguf.tokenizer.byte_level import ByteLevel, is_byte_level, merges_of, pre_tokenizer_of
from lorasmith.export.gguf.tokenizer.sentencepiece import (
    BYTE,
    KEEPING,
    LOWEST,
    Merging,
    adds_space,
    begin_token,
    is_sentencepiece,
    scores_of,
)
from lorasmith.i18n import _, listed
from lorasmith.loading.tokenizer_file import TEXTS

STRIPPING = "phi-3"  # in the name of a model: llama.cpp then leaves out white space after special tokens
NEEDED = ("</s>", *KEEPING)  # tokens that it then looks up
RESERVED = re.compile("phi-?(?=3)|modern-(?=bert)", re.IGNORECASE)  # in names of models that it treats in other ways


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer: its tokens by id and their types, and how text becomes tokens.

    merges, pre: of a byte-level tokenizer. scores: of one of SentencePiece's kind. space: whether it puts a space
    before a text. strips: whether it leaves out white space after special tokens.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    pre: str = "default"
    scores: Sequence[float] = ()
    space: bool = False
    strips: bool = False

    @property
    def model(self) -> str:
        """GGUF's name of the kind."""
        return "llama" if self.scores else "gpt2"

    @property
    def core(self) -> ByteLevel | Merging:
        """A tokenizer that is made only of what is here."""
        if self.scores:
            return Merging(list(self.tokens), list(self.types), list(self.scores), self.space, self.strips)
        return ByteLevel(self.tokens, self.types, self.merges, self.pre)

    def name_of(self, stem: str) -> str:
        """A name for the model that makes llama.cpp treat special tokens as the tokenizer does."""
        if self.strips:
            return stem if STRIPPING in stem.lower() else f"{STRIPPING} {stem}"
        return RESERVED.sub(lambda found: found[0].rstrip("-") + ".", stem)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the `rows` of the embedding. Raises ModelError for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if isinstance(backend, Tokenizer) else {}
    if not is_byte_level(parts) and not is_sentencepiece(backend):
        raise ModelError(
            _(
                "The tokenizer ({kind}) is neither byte-level BPE nor of SentencePiece's kind with bytes for unknown "
                "characters, and only such tokenizers can be exported to GGUF. Use lorasmith merge, and convert the "
                "folder with llama.cpp's convert_hf_to_gguf.py.",
                kind=type(tokenizer).__name__,
            )
        )
    tokens, types = _tokens(tokenizer, rows)
    if is_byte_level(parts):
        pre = pre_tokenizer_of(parts, tokenizer.backend_tokenizer.pre_tokenizer, compared_texts(tokenizer))
        return Vocabulary(tokens, types, merges_of(parts), pre)
    scores = scores_of(parts)
    space, strips = adds_space(tokenizer), _strips(tokenizer)
    return Vocabulary(tokens, types, scores=[scores.get(token, LOWEST) for token in tokens], space=space, strips=strips)


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    has_bytes = is_sentencepiece(tokenizer.backend_tokenizer)
    types = {i: TokenType.BYTE if has_bytes and BYTE.fullmatch(t) else TokenType.NORMAL for i, t in tokens.items()}
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i] = added.content
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if has_bytes and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    ids = range(max(rows, max(tokens) + 1))
    return [tokens.get(i, f"[PAD{i}]") for i in ids], [int(types.get(i, TokenType.UNUSED)) for i in ids]


def _strips(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether white space after special tokens is left out. Raises ModelError if llama.cpp cannot do it."""
    added = tokenizer.added_tokens_decoder.values()
    stripping = [token.content for token in added if token.rstrip]
    if stripping and (missing := [token for token in NEEDED if token not in tokenizer.get_vocab()]):
        raise ModelError(
            _(
                "The tokenizer leaves out white space after {tokens}, which llama.cpp does only for tokenizers with "
                "the tokens {missing}.",
                tokens=listed(stripping[:4]),
                missing=listed(missing),
            )
        )
    return bool(stripping)


def compared_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of many kinds, except those that the tokenizer normalizes first, which llama.cpp does not do.

    With a tokenizer that puts a space before the first text only, they follow a special token, as in all prompts.
    """
    if is_sentencepiece(tokenizer.backend_tokenizer):
        return [begin_token(tokenizer) + text for text in TEXTS]
    normalizer = tokenizer.backend_tokenizer.normalizer
    return [text for text in TEXTS if normalizer is None or normalizer.normalize_str(text) == text]


def first_other_text(tokenizer: PreTrainedTokenizerBase, core: ByteLevel | Merging) -> str | None:
    """The first of `compared_texts` that the two split otherwise, or give other token ids; None if there is none."""
    own = tokenizer.backend_tokenizer.pre_tokenizer
    for text in compared_texts(tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != core.ids(text) or (isinstance(core, ByteLevel) and not core.splits_like(own, text)):
            return text
    return None
