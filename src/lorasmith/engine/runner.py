"""Continuous batching: every step is one flat row of prompt pieces and newest tokens, sorted by adapter."""

from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby

import torch
from torch import Tensor

from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.prefix_cache import Prefixes
from lorasmith.engine.request import Chunk, Running
from lorasmith.engine.scheduler import Scheduler
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import FastDecoder
from lorasmith.model.head import next_logits
from lorasmith.model.row import Row, Span

PREFIXES = 2**14  # tokens of beginnings that are worth keeping


class Packed:
    """At most `slots` requests at once, `tokens` tokens a step; a request joins or leaves at any step.

    The cache holds `cache_tokens` of running requests, and a quarter of that of the beginnings of earlier prompts.
    """

    def __init__(self, base: Base, slots: int, tokens: int, cache_tokens: int, decoder: FastDecoder) -> None:
        self.base, self.decoder = base, decoder
        self.cache, self.prefixes = KVCache(cache_tokens), Prefixes(min(cache_tokens // 4, PREFIXES))
        self.scheduler = Scheduler(self.cache, slots, tokens)
        self._held: set[str] = set()

    @property
    def longest(self) -> int:
        """Tokens of the longest request that has room."""
        return self.cache.limit

    def admits(self, lengths: Sequence[int]) -> bool:
        """Whether requests of so many tokens would get their places in the next step."""
        return self.scheduler.admits(lengths)

    def schedule(self, waiting: deque[Running]) -> list[Chunk]:
        """This step's pieces in the order that is computed fastest; takes from `waiting` what finds a place."""
        chunks = self.scheduler.schedule(waiting, self._begin)

        def place(chunk: Chunk) -> tuple[int, int]:
            return self.cache.region(chunk.running.slot)

        if self.decoder.bank is not None and all(chunk.length == 1 for chunk in chunks):
            return sorted(chunks, key=place)  # attention reads the cache in this order
        return sorted(chunks, key=lambda chunk: (chunk.running.request.adapter or "", place(chunk)))

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [N, V], float32, of the chunks that are their request's last, in order."""
        with self._adapters(chunks):
            logits_NV = next_logits(self.base, flat_row(chunks).to(self.base.device), self.cache)
        for chunk in chunks:
            run, was_prompt = chunk.running, chunk.is_last and not chunk.running.replied
            run.past += chunk.length
            if was_prompt:
                self.prefixes.save(run.version, run.ids, self.cache, run.slot)
        return logits_NV

    def release(self, run: Running) -> None:
        """The request has ended: its place is free from the next step on."""
        self.scheduler.release(run)

    def clear(self) -> None:
        """Forget all requests and what they left: half a step, or what is no number, which a mask does not hide."""
        self.scheduler.clear()
        self.cache.clear()
        self.decoder.clear()
        self._held = set()

    def _begin(self, run: Running) -> None:
        """It has got its place: what is known of its beginning goes there."""
        self._held = set()
        run.version = self._version(run)
        run.past = self.prefixes.load(run.version, run.ids, self.cache, run.slot)

    def _version(self, run: Running) -> Hashable:
        """What its adapter is now; None: the base alone."""
        name = run.request.adapter
        return None if name is None else self.decoder.weights(name).version()

    def _adapters(self, chunks: Sequence[Chunk]) -> AbstractContextManager[None]:
        """Within it the adapters of these chunks have their slots in the bank, and layers compute there."""
        names = {name for chunk in chunks if (name := chunk.running.request.adapter) is not None}
        if not names <= self._held or not self.decoder.holds(names):  # since the last step somebody has come
            self.decoder.hold(names)
            self._held = names
        return self.decoder.running()


def flat_row(chunks: Sequence[Chunk]) -> Row:
    """The chunks end to end; `at_N` are the last tokens of those that get a new one."""
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
    )
