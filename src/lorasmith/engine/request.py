"""What a caller asks of the engine, and what comes back."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.sampling.json_mode import JsonObject
from lorasmith.engine.sampling.logprobs import TokenLogprobs
from lorasmith.engine.sampling.penalty import Seen

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

    `finish` on the last: 'stop' (a stop token, a stop text, or a whole JSON object where one was asked for), 'length'
    (as long as allowed, or as the model admits). `logprobs` where the sampling asks for them.
    """

    key: int
    token: int
    text: str
    finish: Finish | None
    logprobs: TokenLogprobs | None = None


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
    detokenizer: Detokenizer
    version: Hashable = None  # what its keys and values depend on, besides its tokens: from when it got its place
    past: int = 0
    slot: int = -1
    seen: Seen | None = field(init=False)  # where a penalty needs it
    json: JsonObject | None = field(init=False)
    told: TokenLogprobs | None = field(init=False, default=None)  # of the token that was chosen and not accepted yet

    def __post_init__(self) -> None:
        self.seen = Seen(self.request.ids) if self.request.sampling.penalizes else None
        self.json = JsonObject(self.detokenizer.tokenizer) if self.request.sampling.json_object else None

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: the rest of the prompt, or the newest token."""
        return len(self.ids) - self.past

    @property
    def replied(self) -> int:
        """Tokens of the reply so far."""
        return len(self.ids) - len(self.request.ids)

    def accept(self, token: int) -> Event:
        """Append the token that was chosen; what it adds to the text, and whether this ends the reply."""
        self.ids.append(token)
        if self.seen is not None:
            self.seen.add(token)
        if token in self.stop_ids:
            return Event(self.key, token, self.detokenizer.close(), "stop", self.told)
        text, is_full = self.detokenizer.push(token), len(self.ids) >= self.limit
        is_whole = self.json is not None and self.json.push(token)
        if is_full or is_whole:
            text += self.detokenizer.close()
        is_stopped = self.detokenizer.stopped or is_whole
        return Event(self.key, token, text, "stop" if is_stopped else "length" if is_full else None, self.told)


class Chunk(NamedTuple):
    """The next `length` tokens of a request that go through the model in this step."""

    running: Running
    length: int

    @property
    def is_last(self) -> bool:
        """Whether a new token follows: nothing of the request is left behind this piece."""
        return self.length == self.running.pending
