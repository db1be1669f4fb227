"""From tokens to text as they come: no half characters, nothing that a stop text may still take back."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer shows for bytes that are no whole character


class Detokenizer:
    """The text of one reply, special tokens left out. All that was pushed and closed joins to the reply's text.

    A few tokens back are decoded again with each new one: whether a piece begins with a space may depend on them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop text was met; nothing follows
        self.tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # tokens [start, read) are text already and kept as context
        self._withheld = ""  # text that may be the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that is certain once `token` follows; often empty for one that ends inside a character."""
        self._ids.append(token)
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if text.endswith(REPLACEMENT) or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def close(self) -> str:
        """The rest, when no token follows: also the beginning of a stop text, but not half a character at its end."""
        if self.stopped:
            return ""
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        certain = self._release(text[len(known) :].rstrip(REPLACEMENT))
        rest, self._withheld = self._withheld, ""
        return certain + rest

    def _release(self, text: str) -> str:
        text = self._withheld + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._withheld = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._withheld = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, start: int, end: int) -> str:
        if start == end:
            return ""
        text = self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
