"""A tokenizer of SentencePiece's kind as GGUF stores it, and its token ids as llama.cpp computes them.

Such a tokenizer (of Llama 2, Gemma or Phi 3) is BPE over characters, with bytes for unknown ones. GGUF has a score for
each token instead of merges: of all neighbors that form a token together, those with the highest score are merged.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LOWEST = -1e6  # the score of tokens that no merge makes
KEEPING = ("<s>", "<unk>", "<|endoftext|>")
WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found in a text before anything is merged


def is_sentencepiece(core: object) -> bool:
    """Whether a tokenizer is of this kind."""
    if not isinstance(core, Tokenizer) or not isinstance(core.model, models.BPE):
        return False
    return bool(core.model.byte_fallback) and core.token_to_id("<0x00>") is not None


def scores_of(parts: Mapping[str, Any]) -> dict[str, float]:
    """The score of each token that a merge makes: the earlier its first merge, the higher."""
    found: dict[str, float] = {}
    for rank, merge in enumerate(parts["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.setdefault(left + right, -float(rank))
    return found


def begin_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token that a text may follow; empty if there is none."""
    return str(tokenizer.bos_token or next(iter(tokenizer.all_special_tokens), ""))


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space is put before a text that follows a special token."""
    first, *more = tokenizer(begin_token(tokenizer) + "a", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens([first, *more])
    return any(token.startswith(SPACE) for token in tokens)


class Merging:
    """Token ids that follow from the tokens, types and scores of a file.

    strips: whether white space after a special token is left out, as llama.cpp does for models named Phi-3, but not
    after those of `KEEPING`.
    """

    def __init__(
        self, tokens: list[str], types: list[int], scores: list[float], space: bool, strips: bool = False
    ) -> None:
        self.ids_by_token = {token: i for i, token in enumerate(tokens)}
        self.scores, self.space, self.strips = scores, space, strips
        whole = [token for token, kind in zip(tokens, types, strict=True) if kind in WHOLE and token]
        ordered = sorted(whole, key=lambda token: -len(token.encode()))
        self.special = re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None

    def ids(self, text: str) -> list[int]:
        """The ids of a text in which special tokens count."""
        found: list[int] = []
        strip = False
        for i, part in enumerate(self.special.split(text) if self.special else [text]):
            if i % 2:
                found.append(self.ids_by_token[part])
                strip = self.strips and part not in KEEPING
            elif part := part.lstrip() if strip else part:
                spaced = f" {part}" if self.space else part
                found += self._merged(spaced.replace(" ", SPACE))
        return found

    def _merged(self, text: str) -> Iterator[int]:
        """Merge the neighbors with the highest score, of equal ones the first, until none form a token."""
        pieces: list[str] = list(text)
        after = [*range(1, len(pieces)), -1]
        before = [*range(-1, len(pieces) - 1)]
        heap: list[tuple[float, int, str]] = []

        def push(left: int) -> None:
            right = after[left] if left >= 0 else -1
            if right >= 0 and (both := pieces[left] + pieces[right]) in self.ids_by_token:
                heapq.heappush(heap, (-self.scores[self.ids_by_token[both]], left, both))

        for left in range(len(pieces) - 1):
            push(left)
        while heap:
            _score, left, both = heapq.heappop(heap)
            right = after[left]
            if not pieces[left] or right < 0 or pieces[left] + pieces[right] != both:
                continue
            pieces[left], pieces[right] = both, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            push(before[left])
            push(left)
        for piece in filter(None, pieces):
            if piece in self.ids_by_token:
                yield self.ids_by_token[piece]
            else:
                yield from (self.ids_by_token[f"<0x{byte:02X}>"] for byte in piece.encode())
