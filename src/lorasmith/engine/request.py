"""What a caller asks of the engine, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from lorasmith.engine.config import SamplingConfig
from lorasmith.engine.text import Stream

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue. `ids` from data.template's `encode_prompt`, `stop_ids` from the same template.

    `adapter`: a name in base.adapters; None: the base alone.
    """

    ids: Sequence[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    adapter: str | None = None
    stop_ids: Sequence[int] = ()


class Event(NamedTuple):
    """One new token of request `key` and the text that is now complete; both are final.

    `finish` on the last: 'stop' (a stop token, or a stop text), 'length' (as long as allowed, or as the model admits).
    """

    key: int
    token: int
    text: str
    finish: Finish | None


class Reply(NamedTuple):
    """A finished request: its text, without what stopped it, and its tokens, the stop token included."""

    text: str
    ids: list[int]
    finish: Finish


@dataclass(eq=False, slots=True)
class Running:
    """A request inside the engine. `ids` is prompt and reply; `past` of them are in the cache, at place `slot`."""

    key: int
    request: Request
    ids: list[int]
    limit: int  # length of `ids` at which it ends
    stop_ids: frozenset[int]
    stream: Stream
    generator: torch.Generator
    past: int = 0
    slot: int = -1

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: the rest of the prompt, or the newest token."""
        return len(self.ids) - self.past

    def accept(self, token: int) -> Event:
        """Append the token that was chosen; what it adds to the text, and whether this ends the reply."""
        self.ids.append(token)
        if token in self.stop_ids:
            return Event(self.key, token, self.stream.close(), "stop")
        text, is_full = self.stream.push(token), len(self.ids) >= self.limit
        if is_full:
            text += self.stream.close()
        return Event(self.key, token, text, "stop" if self.stream.stopped else "length" if is_full else None)


class Chunk(NamedTuple):
    """The next `length` tokens of a request that go through the model in this step."""

    running: Running
    length: int

    @property
    def is_last(self) -> bool:
        """Whether a new token follows: nothing of the request is left behind this piece."""
        return self.length == self.running.pending
