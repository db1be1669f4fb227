"""The packed layout: continuous batching, where each step computes one row of prompt chunks and newest tokens."""

from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby

import torch
from torch import Tensor

from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.prefix_cache import PrefixCache
from lorasmith.engine.request import Chunk, RunningRequest
from lorasmith.engine.scheduler import Scheduler
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import FastDecoder
from lorasmith.model.head import next_logits
from lorasmith.model.row import Row, Span, slices_of

MAX_PREFIX_TOKENS = 2**14  # maximum size of the prefix cache


class Packed:
    """Runs up to `slots` requests with up to `tokens` tokens per step; requests start and end at any step.

    The KV cache holds up to `cache_tokens` tokens of running requests, and the prefix cache up to a quarter of that.
    """

    def __init__(self, base: Base, slots: int, tokens: int, cache_tokens: int, decoder: FastDecoder) -> None:
        self.base, self.decoder = base, decoder
        self.cache, self.prefixes = KVCache(cache_tokens), PrefixCache(min(cache_tokens // 4, MAX_PREFIX_TOKENS))
        self.scheduler = Scheduler(self.cache, slots, tokens)
        self._held: set[str] = set()  # adapters known to have a slot in the bank

    @property
    def longest(self) -> int:
        """The size of the KV cache."""
        return self.cache.limit

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether there is memory for new requests with these prompt lengths."""
        return self.scheduler.admits(lengths)

    def make_way(self, tokens: int, waiting: deque[RunningRequest]) -> bool:
        """Preempt requests of adapters that have several, so that another one can start; False if it cannot."""
        return self.scheduler.make_way(tokens, waiting)

    def schedule(self, waiting: deque[RunningRequest]) -> list[Chunk]:
        """The chunks of this step in the order that is computed fastest; starts waiting requests if there is room."""
        chunks = self.scheduler.schedule(waiting, self._begin)

        def place(chunk: Chunk) -> tuple[int, int]:
            return self.cache.region(chunk.running.slot)

        if self.decoder.bank is not None and all(chunk.length == 1 for chunk in chunks):
            return sorted(chunks, key=place)  # so that attention reads the cache in order
        return sorted(chunks, key=lambda chunk: (chunk.running.request.adapter or "", place(chunk)))

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [N, V] in float32 of the chunks with `is_last`, in order."""
        with self._adapters(chunks):
            logits_NV = next_logits(self.base, flat_row(chunks).to(self.base.device), self.cache)
        for chunk in chunks:
            run, was_prompt = chunk.running, chunk.is_last and not chunk.running.replied
            run.past += chunk.length
            if was_prompt:
                self.prefixes.save(run.version, run.ids, self.cache, run.slot, run.active_from)
        return logits_NV

    def release(self, run: RunningRequest) -> None:
        """Free the slot of a request."""
        self.scheduler.release(run)

    def clear(self) -> None:
        """Drop all requests, the cache and the bank's content, which may be half updated or contain NaN."""
        self.scheduler.clear()
        self.cache.clear()
        self.decoder.clear()
        self._held = set()

    def _begin(self, run: RunningRequest) -> None:
        """Load the cached prefix of a request that just got its slot."""
        self._held = set()
        run.version = self._version(run)
        run.past = self.prefixes.load(run.version, run.ids, self.cache, run.slot, run.active_from)
        if not run.replied:  # not when it was preempted, since its own blocks are cached by then
            run.cached = run.past

    def _version(self, run: RunningRequest) -> Hashable:
        """The current version of the request's adapter; None for the base model."""
        name = run.request.adapter
        return None if name is None else self.decoder.weights(name).version()

    def _adapters(self, chunks: Sequence[Chunk]) -> AbstractContextManager[None]:
        """Put the adapters of these chunks into the bank; inside the block, layers are computed there."""
        names = {name for chunk in chunks if (name := chunk.running.request.adapter) is not None}
        if not names <= self._held or not self.decoder.holds(names):
            self.decoder.hold(names)
            self._held = names
        return self.decoder.running()


def flat_row(chunks: Sequence[Chunk]) -> Row:
    """The row of these chunks, concatenated. `at_N` are the last tokens of chunks with `is_last`."""
    is_partial = any(run.active_from > run.past for run, _length in chunks)
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    slots: list[Slice] = []
    for adapter, group in groupby(chunks, key=lambda chunk: chunk.running.request.adapter):
        first = len(ids)
        for run, length in group:
            spans.append(Span(len(ids), len(ids) + length, run.past, run.slot))
            ids += run.ids[run.past : run.past + length]
            positions += range(run.past, run.past + length)
        slots.append(Slice(adapter, first, len(ids)))
    label_slots = None
    if is_partial:  # some tokens of requests to an aLoRA come before its invocation sequence
        places = [(run, run.past + i) for run, length in chunks for i in range(length)]
        active = [position >= run.active_from for run, position in places]
        names = [slot.adapter for slot in slots for _token in range(slot.start, slot.end)]
        routed = [name if is_active else None for name, is_active in zip(names, active, strict=True)]
        ends = [span.end - 1 for span, chunk in zip(spans, chunks, strict=True) if chunk.is_last]
        slots, label_slots = list(slices_of(routed)), slices_of(routed[end] for end in ends)
    at = [span.end - 1 for span, chunk in zip(spans, chunks, strict=True) if chunk.is_last]
    return Row(
        ids_T=torch.tensor(ids, dtype=torch.long),
        position_T=torch.tensor(positions, dtype=torch.long),
        spans=tuple(spans),
        counts=tuple(int(chunk.is_last) for chunk in chunks),
        at_N=torch.tensor(at, dtype=torch.long),
        target_N=torch.zeros(len(at), dtype=torch.long),
        weight_N=torch.zeros(len(at)),
        slots=tuple(slots),
        label_slots=label_slots,
    )
