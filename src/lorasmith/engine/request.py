"""Requests to the engine, the events and replies it returns, and its internal state of a request."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.sampling.grammar import Derivation, Grammar
from lorasmith.engine.sampling.logprobs import TokenLogprobs
from lorasmith.engine.sampling.penalty import TokenCounts

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue. `ids` and `stop_ids` come from a Template; `adapter` None means the base model.

    `grammar`: what the reply must follow, unless `sampling.json_object` is set.
    """

    ids: Sequence[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    adapter: str | None = None
    stop_ids: Sequence[int] = ()
    grammar: Grammar | None = None


class Event(NamedTuple):
    """One new token of the request `key`, and the text that became final with it.

    `finish` is set on the last event: 'stop' (stop token, stop text, or a reply that its grammar completes), 'length'
    (max_new_tokens or the context length was reached) or 'error' (the grammar is too complex). `logprobs` is set if the
    request asks for them. `cached`: the number of the prompt's tokens that were in the prefix cache.
    """

    key: int
    token: int
    text: str
    finish: Finish | None
    logprobs: TokenLogprobs | None = None
    cached: int = 0


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
    cached: int = 0  # of the prompt's tokens, those that were in the prefix cache
    active_from: int = 0  # its adapter computes the tokens from this position on, the base model those before it
    slot: int = -1  # -1 while it waits
    started: float = 0.0  # when it got its slot, in seconds of the monotonic clock
    token_counts: TokenCounts | None = field(init=False)  # if a penalty is set
    derivation: Derivation | None = field(init=False)  # if the reply must follow a grammar
    logprobs: TokenLogprobs | None = field(init=False, default=None)  # of the sampled token, until `accept`

    def __post_init__(self) -> None:
        self.token_counts = TokenCounts(self.request.ids) if self.request.sampling.penalizes else None
        is_json, grammar = self.request.sampling.json_object, self.request.grammar
        grammar = Grammar.json_object(self.detokenizer.tokenizer) if is_json else grammar
        self.derivation = Derivation(grammar) if grammar else None

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
        text, finish = self._text_of(token)
        return Event(self.key, token, text, finish, self.logprobs, self.cached)

    def _text_of(self, token: int) -> tuple[str, Finish | None]:
        if token in self.stop_ids:
            return self.detokenizer.close(), "stop"
        is_whole = self.derivation is not None and self.derivation.push(token)
        if self.derivation is not None and self.derivation.is_broken:
            return self.detokenizer.close(), "error"
        text, is_full = self.detokenizer.push(token), len(self.ids) >= self.limit
        if is_full or is_whole:
            text += self.detokenizer.close()
        return text, "stop" if self.detokenizer.stopped or is_whole else "length" if is_full else None


class Chunk(NamedTuple):
    """The next `length` tokens of a request, to be computed in this step."""

    running: RunningRequest
    length: int

    @property
    def is_last(self) -> bool:
        """Whether this chunk completes the pending tokens, so that a new token is sampled after it."""
        return self.length == self.running.pending
