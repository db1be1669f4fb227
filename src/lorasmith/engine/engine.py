"""The inference engine, used by chat, generate, the server and the samples during training.

It works on token ids and adapter names; chat templates and HTTP are up to the callers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.request import Chunk, Event, Finish, Reply, Request, RunningRequest
from lorasmith.engine.runner import Packed
from lorasmith.engine.sampling.next_token import next_tokens
from lorasmith.engine.self_test import decoder_of, padded_layout
from lorasmith.errors import AdapterError, DataError
from lorasmith.i18n import _
from lorasmith.lora.alora import first_active
from lorasmith.model.base import Base
from lorasmith.model.vocabulary import refuse_surplus
from lorasmith.system.memory import convert_memory_errors

DEFAULT_CACHE_TOKENS = 2**15  # size of the KV cache, unless the model's context length is larger


class Layout(Protocol):
    """How requests are batched: `Packed`, or `Padded` for models that do not support packed rows."""

    @property
    def longest(self) -> int | None:
        """The maximum length of a request, prompt and reply, that fits into memory; None if there is no limit."""

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether new requests with these prompt lengths fit into memory besides the running ones."""

    def make_way(self, tokens: int, waiting: deque[RunningRequest]) -> bool:
        """Preempt requests into `waiting` so that another one can start; False if it cannot, and none is preempted."""

    def schedule(self, waiting: deque[RunningRequest]) -> list[Chunk]:
        """The chunks to compute in this step; may take requests from `waiting`."""

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """The logits [N, V] of the N chunks that complete their request's prompt or last token."""

    def release(self, run: RunningRequest) -> None:
        """Free the resources of a request that has ended or was canceled."""

    def clear(self) -> None:
        """Drop all requests after a step has failed."""


class Engine:
    """Generates replies to many requests in one batch, each with its own adapter, sampling settings and seed.

    A reply does not depend on the other requests, up to rounding of the logits. The model is put into eval mode.

    Args:
        base: the model, with its adapters.
        slots: the maximum number of running requests.
        tokens: the maximum number of tokens per step. Longer prompts are computed in chunks (packed layout only).
        cache_tokens: the maximum size of the KV cache, which is allocated on demand (packed layout only).
        prepack: whether weights may be replaced by oneDNN's packed format; the model can then only decode.

    `why` is the reason for using padded batches, or None.
    """

    def __init__(
        self, base: Base, slots: int = 16, tokens: int = 512, cache_tokens: int | None = None, prepack: bool = False
    ) -> None:
        self.base, self.slots = base, slots
        self._decoder = decoder_of(base)
        self.why = self._decoder.problem
        most = cache_tokens or max(DEFAULT_CACHE_TOKENS, base.max_positions or 0)
        self._layout: Layout = (
            padded_layout(self._decoder, slots) if self.why else Packed(base, slots, tokens, most, self._decoder)
        )
        if prepack:
            self._decoder.prepack()
        self._waiting: deque[RunningRequest] = deque()
        self._live: dict[int, RunningRequest] = {}
        self._next_key = 0

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._live)

    @property
    def cache(self) -> KVCache | None:
        """The KV cache; None with padded batches, which use the cache of transformers."""
        return self._layout.cache if isinstance(self._layout, Packed) else None

    @property
    def preemptions(self) -> int:
        """How often a request was preempted, for lack of memory or for another adapter, to be recomputed later."""
        return self._layout.scheduler.preemptions if isinstance(self._layout, Packed) else 0

    def is_running(self, key: int) -> bool:
        """Whether the request has a slot, as opposed to waiting for one."""
        run = self._live.get(key)
        return run is not None and run.slot >= 0

    def has_room(self, request: Request) -> bool:
        """Whether there is memory for one more request after those already waiting in the engine."""
        lengths = [len(run.ids) for run in self._waiting]
        return not self.busy or self._layout.admits([*lengths, len(request.ids)])

    def add_first(self, request: Request) -> int | None:
        """Start a request in the next step, in place of others if need be; returns its key, or None if it must wait.

        Only adapters with several running requests lose some, which are recomputed later: their replies do not change.
        Raises as `add`.
        """
        if not self._layout.make_way(len(request.ids), self._waiting):
            return None
        run = self._admit(request, self._next_key)
        self._next_key += 1
        self._live[run.key] = run
        self._waiting.appendleft(run)
        return run.key

    def add(self, request: Request) -> int:
        """Queue a request and return its key, which identifies it in events.

        Raises DataError if the prompt is empty or too long, AdapterError if the adapter is not loaded, and ConfigError
        or MissingExtraError if JSON mode is not available.
        """
        return self.add_all([request])[0]

    def add_all(self, requests: Iterable[Request]) -> list[int]:
        """Queue all of these requests, or none of them if one is invalid. Raises as `add`."""
        runs = [self._admit(request, self._next_key + i) for i, request in enumerate(requests)]
        self._next_key += len(runs)
        self._live |= {run.key: run for run in runs}
        self._waiting.extend(runs)
        return [run.key for run in runs]

    def cancel(self, key: int) -> None:
        """Cancel a request and free its slot. Does nothing if it has ended already."""
        run = self._live.pop(key, None)
        if run is not None and run in self._waiting:
            self._waiting.remove(run)
        elif run is not None:
            self._layout.release(run)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run the model once: generates a token for every request whose prompt is complete.

        An exception cancels all requests; the engine can then be used for new ones. Raises OutOfMemoryError if an
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
        except BaseException:  # KeyboardInterrupt too, which can leave any state half updated
            self._live.clear()
            self._waiting.clear()
            self._layout.clear()
            raise

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        if self.base.model.training:
            self.base.model.eval()
        is_base = all(chunk.running.request.adapter is None for chunk in chunks)
        try:
            with self.base.without_trained_biases() if is_base else nullcontext():
                return self._layout.run(chunks)
        finally:
            self.base.router.route(None)

    def _postprocess(self, ready: Sequence[RunningRequest], tokens: Sequence[int]) -> list[Event]:
        events = [run.accept(token) for run, token in zip(ready, tokens, strict=True)]
        for run, event in zip(ready, events, strict=True):
            if event.finish:
                del self._live[run.key]
                self._layout.release(run)
        return events

    def _admit(self, request: Request, key: int) -> RunningRequest:
        known = self.base.adapters | self._decoder.held
        if request.adapter is not None and request.adapter not in known:
            names = ", ".join(map(repr, known)) or _("none")
            raise AdapterError(
                _("no adapter named {name!r} is loaded; loaded adapters: {names}.", name=request.adapter, names=names)
            )
        if not request.ids:
            raise DataError(_("the prompt is empty, so there is nothing to continue."))
        refuse_surplus(self.base, request.ids)
        limit = min(limit for limit in (self.base.max_positions, self._layout.longest, 2**62) if limit is not None)
        if len(request.ids) >= limit:
            text = _("the prompt has {tokens} tokens, which leaves no room for a reply: the model's context length "
                    "is {limit} tokens. Shorten the prompt.",
                     tokens=len(request.ids), limit=limit)  # fmt: skip
            raise DataError(text)
        settings, tokenizer = request.sampling, self.base.tokenizer
        refuse_surplus(self.base, settings.logit_bias or (), "logit_bias")
        special = tokenizer.get_added_vocab() if settings.stop else {}  # stop on their ids: the text omits them
        return RunningRequest(
            key=key,
            request=request,
            ids=list(request.ids),
            limit=min(len(request.ids) + settings.max_new_tokens, limit),
            stop_ids=frozenset((*request.stop_ids, *(special[stop] for stop in settings.stop if stop in special))),
            detokenizer=Detokenizer(tokenizer, settings.stop),
            active_from=self._active_from(request),
        )

    def _active_from(self, request: Request) -> int:
        """The position from which on the adapter is active, in the prompt or after it."""
        if request.adapter not in self.base.router.partial:
            return 0
        return first_active(request.ids, self.base.adapters[request.adapter].config)


def generate(engine: Engine, requests: Iterable[Request]) -> Iterator[Event]:
    """Yield the events of these requests; keys are their indices. Closing the iterator cancels unfinished requests.

    Events of other requests in the engine are discarded, so two such iterators must not be interleaved.
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


def replies(engine: Engine, requests: Sequence[Request], finished: Callable[[], None] = lambda: None) -> list[Reply]:
    """Generate all replies, in the order of the requests. finished: called after each, in the order of their ends."""
    texts: list[list[str]] = [[] for _request in requests]
    ids: list[list[int]] = [[] for _request in requests]
    finish: list[Finish] = ["length"] * len(requests)
    for event in generate(engine, requests):
        texts[event.key].append(event.text)
        ids[event.key].append(event.token)
        finish[event.key] = event.finish or finish[event.key]
        if event.finish:
            finished()
    return [Reply("".join(text), own, end) for text, own, end in zip(texts, ids, finish, strict=True)]
