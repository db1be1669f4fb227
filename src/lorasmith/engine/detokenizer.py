"""Incremental detokenization: turns tokens into text as they are generated, and detects stop texts."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers return for incomplete UTF-8 sequences


class Detokenizer:
    """Produces the text of one reply piece by piece, without special tokens.

    The pieces from `push` and `close` concatenate to the full text. No piece ends with an incomplete character or
    contains the beginning of a stop text. A few earlier tokens are decoded again with each new one, because they
    determine whether its text begins with a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop text was generated; no more text follows
        self.tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # tokens [start, read) have been returned as text and serve as context
        self._withheld = ""  # may be the beginning of a stop text

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now final, which may be empty."""
        self._ids.append(token)
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if text.endswith(REPLACEMENT) or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def close(self) -> str:
        """The remaining text at the end of the reply, without an incomplete character at its end."""
        if self.stopped:
            return ""
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        certain = self._release(text[len(known) :].rstrip(REPLACEMENT))
        rest, self._withheld = self._withheld, ""
        return certain + rest

    def _release(self, text: str) -> str:
        text = self._withheld + text
        stops_at = [at for at in map(text.find, self._stops) if at >= 0]
        if stops_at:
            self.stopped, self._withheld = True, ""
            return text[: min(stops_at)]
        overlap = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._withheld = text[len(text) - overlap :]
        return text[: len(text) - overlap]

    def _decode(self, start: int, end: int) -> str:
        if start == end:
            return ""
        text = self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
