"""Requests to the engine, the events and replies it returns, and its internal state of a request."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.sampling.json_mode import JsonObject
from lorasmith.engine.sampling.logprobs import TokenLogprobs
from lorasmith.engine.sampling.penalty import TokenCounts

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue. `ids` and `stop_ids` come from a Template; `adapter` None means the base model."""

    ids: Sequence[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    adapter: str | None = None
    stop_ids: Sequence[int] = ()


class Event(NamedTuple):
    """One new token of the request `key`, and the text that became final with it.

    `finish` is set on the last event: 'stop' (stop token, stop text, or a complete JSON object in JSON mode) or
    'length' (max_new_tokens or the context length was reached). `logprobs` is set if the request asks for them.
    """

    key: int
    token: int
    text: str
    finish: Finish | None
    logprobs: TokenLogprobs | None = None


class Reply(NamedTuple):
    """A finished reply: its text without the stop text, and its tokens including the stop token."""

    text: str
    ids: list[int]
    finish: Finish


@dataclass(eq=False, slots=True)
class RunningRequest:
    """The state of a request in the engine. `ids` is prompt and reply, of which the first `past` tokens are cached."""

    key: int
    request: Request
    ids: list[int]
    limit: int  # maximum length of `ids`
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    version: Hashable = None  # version of the adapter when the request got its slot; part of the prefix cache's keys
    past: int = 0
    active_from: int = 0  # its adapter computes the tokens from this position on, the base model those before it
    slot: int = -1  # -1 while it waits
    token_counts: TokenCounts | None = field(init=False)  # if a penalty is set
    json: JsonObject | None = field(init=False)  # in JSON mode
    logprobs: TokenLogprobs | None = field(init=False, default=None)  # of the sampled token, until `accept`

    def __post_init__(self) -> None:
        self.token_counts = TokenCounts(self.request.ids) if self.request.sampling.penalizes else None
        self.json = JsonObject(self.detokenizer.tokenizer) if self.request.sampling.json_object else None

    @property
    def pending(self) -> int:
        """Number of tokens that are not cached yet: the rest of the prompt, or the last token."""
        return len(self.ids) - self.past

    @property
    def replied(self) -> int:
        """Number of tokens of the reply so far."""
        return len(self.ids) - len(self.request.ids)

    def accept(self, token: int) -> Event:
        """Append a sampled token; returns the event with its text, and `finish` if the reply is complete."""
        self.ids.append(token)
        if self.token_counts is not None:
            self.token_counts.add(token)
        if token in self.stop_ids:
            return Event(self.key, token, self.detokenizer.close(), "stop", self.logprobs)
        text, is_full = self.detokenizer.push(token), len(self.ids) >= self.limit
        is_whole = self.json is not None and self.json.push(token)
        if is_full or is_whole:
            text += self.detokenizer.close()
        is_stopped = self.detokenizer.stopped or is_whole
        return Event(self.key, token, text, "stop" if is_stopped else "length" if is_full else None, self.logprobs)


class Chunk(NamedTuple):
    """The next `length` tokens of a request, to be computed in this step."""

    running: RunningRequest
    length: int

    @property
    def is_last(self) -> bool:
        """Whether this chunk completes the pending tokens, so that a new token is sampled after it."""
        return self.length == self.running.pending
