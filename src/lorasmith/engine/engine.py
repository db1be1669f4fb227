"""The one decoding engine: chat, generate, the trainer's samples and a server all decode here.

It knows tokens and adapters' names; prompts, templates and HTTP are its callers'.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.padded import Padded
from lorasmith.engine.request import Chunk, Event, Finish, Reply, Request, Running
from lorasmith.engine.runner import Packed
from lorasmith.engine.sampling.next_token import next_tokens
from lorasmith.engine.self_test import decoder_of
from lorasmith.errors import AdapterError, DataError
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.system.memory import convert_memory_errors

CACHE = 2**15  # tokens in the key/value cache, or the model's whole context where that is longer


class Layout(Protocol):
    """How requests become forwards of the model: Packed, or Padded where the probe says so."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest request that its memory has room for; None: any."""

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether there is memory for requests of so many tokens beside those that run."""

    def schedule(self, waiting: deque[Running]) -> list[Chunk]:
        """What goes through the model in this step."""

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits of the chunks after which a token is chosen."""

    def release(self, run: Running) -> None:
        """The request has ended or was cancelled."""

    def clear(self) -> None:
        """All requests are over: a step of theirs has failed."""


class Engine:
    """Decodes many requests together, each with its own adapter, sampling and seed.

    A request's answer does not depend on the others, up to rounding of its logits. `slots`: requests at once;
    `tokens`: tokens a step, so that a long prompt goes in pieces beside the answers of others; `cache_tokens`: bound of
    the key/value cache, which is taken as it is needed (both: packed models only).
    The model is put into eval mode: adapters' dropout is for training. `why`: the reason for padded batches, or None.
    `prepack`: the base only decodes from now on, and its weights may be kept in the order that is fastest for that.
    """

    def __init__(
        self, base: Base, slots: int = 16, tokens: int = 512, cache_tokens: int | None = None, prepack: bool = False
    ) -> None:
        self.base, self.slots = base, slots
        self._decoder = decoder_of(base)
        self.why = self._decoder.problem
        most = cache_tokens or max(CACHE, base.max_positions or 0)
        self._layout: Layout = Padded(base, slots) if self.why else Packed(base, slots, tokens, most, self._decoder)
        if prepack:
            self._decoder.prepack()
        self._waiting: deque[Running] = deque()
        self._live: dict[int, Running] = {}
        self._next_key = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._live)

    @property
    def cache(self) -> KVCache | None:
        """The key/value cache; None in padded batches, whose cache is the model's."""
        return self._layout.cache if isinstance(self._layout, Packed) else None

    @property
    def preemptions(self) -> int:
        """How often a request lost its place, because memory was short, and was computed again."""
        return self._layout.scheduler.preemptions if isinstance(self._layout, Packed) else 0

    def is_running(self, key: int) -> bool:
        """Whether a request has a place: it moves with each step."""
        run = self._live.get(key)
        return run is not None and run.slot >= 0

    def has_room(self, request: Request) -> bool:
        """Whether there is memory for one more request, behind those that wait in the engine already."""
        lengths = [len(run.ids) for run in self._waiting]
        return not self.busy or self._layout.admits([*lengths, len(request.ids)])

    def add(self, request: Request) -> int:
        """Queue a request; its key names it in events.

        Raises DataError where the prompt is empty or longer than the model admits, AdapterError for an unknown name.
        """
        return self.add_all([request])[0]

    def add_all(self, requests: Iterable[Request]) -> list[int]:
        """Queue all of these, or none where one of them cannot be answered. Raises as `add`."""
        runs = [self._admit(request, self._next_key + i) for i, request in enumerate(requests)]
        self._next_key += len(runs)
        self._live |= {run.key: run for run in runs}
        self._waiting.extend(runs)
        return [run.key for run in runs]

    def cancel(self, key: int) -> None:
        """Forget a request; its place is free at the next step. One that has ended already is no error."""
        run = self._live.pop(key, None)
        if run is not None and run in self._waiting:
            self._waiting.remove(run)
        elif run is not None:
            self._layout.release(run)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One forward of the model: a token for every request whose prompt is through.

        What it raises ends all requests that the engine has; new ones find it as it was. OutOfMemoryError where an
        allocation failed.
        """
        try:
            with convert_memory_errors():
                chunks = self._layout.schedule(self._waiting)
                if not chunks:
                    return []
                ready = [chunk.running for chunk in chunks if chunk.is_last]
                tokens = next_tokens(self._forward(chunks), ready)
                return self._postprocess(ready, tokens)
        except BaseException:  # an interrupt too, which may come in the middle of anything
            self._live.clear()
            self._waiting.clear()
            self._layout.clear()
            raise

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        if self.base.model.training:
            self.base.model.eval()
        try:
            return self._layout.run(chunks)
        finally:
            self.base.router.route(None)

    def _postprocess(self, ready: Sequence[Running], tokens: Sequence[int]) -> list[Event]:
        events = [run.accept(token) for run, token in zip(ready, tokens, strict=True)]
        for run, event in zip(ready, events, strict=True):
            if event.finish:
                del self._live[run.key]
                self._layout.release(run)
        return events

    def _admit(self, request: Request, key: int) -> Running:
        known = self.base.adapters | self._decoder.held
        if request.adapter is not None and request.adapter not in known:
            names = ", ".join(map(repr, known)) or _("none")
            raise AdapterError(
                _("no adapter named {name!r} is loaded; loaded adapters: {names}.", name=request.adapter, names=names)
            )
        if not request.ids:
            raise DataError(_("the prompt is empty, so there is nothing to continue."))
        limit = min(limit for limit in (self.base.max_positions, self._layout.longest, 2**62) if limit is not None)
        if len(request.ids) >= limit:
            text = _("the prompt has {tokens} tokens, which leaves no room for a reply: the model's context length "
                    "is {limit} tokens. Shorten the prompt.",
                     tokens=len(request.ids), limit=limit)  # fmt: skip
            raise DataError(text)
        settings, tokenizer = request.sampling, self.base.tokenizer
        special = tokenizer.get_added_vocab() if settings.stop else {}  # shown in no text, so no text can be searched
        return Running(
            key=key,
            request=request,
            ids=list(request.ids),
            limit=min(len(request.ids) + settings.max_new_tokens, limit),
            stop_ids=frozenset((*request.stop_ids, *(special[stop] for stop in settings.stop if stop in special))),
            detokenizer=Detokenizer(tokenizer, settings.stop),
        )


def generate(engine: Engine, requests: Iterable[Request]) -> Iterator[Event]:
    """Events of these requests as they come; keys count from 0 in their order. Leaving early cancels the rest.

    Events of other requests that the engine has meanwhile are lost, so two of these must not take turns.
    """
    order = {key: i for i, key in enumerate(engine.add_all(requests))}
    left = set(order)
    try:
        while left:
            for event in engine.step():
                if event.key not in order:
                    continue
                if event.finish:
                    left.discard(event.key)
                yield event._replace(key=order[event.key])
    finally:
        for key in left:
            engine.cancel(key)


def replies(engine: Engine, requests: Sequence[Request]) -> list[Reply]:
    """The finished answers, in the order of the requests."""
    texts: list[list[str]] = [[] for _request in requests]
    ids: list[list[int]] = [[] for _request in requests]
    finish: list[Finish] = ["length"] * len(requests)
    for event in generate(engine, requests):
        texts[event.key].append(event.text)
        ids[event.key].append(event.token)
        finish[event.key] = event.finish or finish[event.key]
    return [Reply("".join(text), own, end) for text, own, end in zip(texts, ids, finish, strict=True)]
