"""Continuous batching: every step is one flat row of prompt pieces and newest tokens, sorted by adapter."""

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, groupby

import torch
from torch import Tensor

from lorasmith.engine.kv import SlotCache
from lorasmith.engine.prefix import Prefixes
from lorasmith.engine.request import Chunk, Running
from lorasmith.errors import ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.decoder import Decoder
from lorasmith.model.forward import hidden
from lorasmith.model.head import next_logits
from lorasmith.model.probe import TOLERANCE
from lorasmith.model.row import Row, Span

PREFIXES = 2**14  # tokens of beginnings that are worth keeping


class Packed:
    """At most `slots` requests at once, `tokens` tokens a step; a request joins or leaves at any step.

    The cache holds `cache_tokens` of running requests, and a quarter of that of the beginnings of earlier prompts.
    Requests that already answer come first, one token each; the rest of the step goes to prompts, the oldest first.
    """

    def __init__(self, base: Base, slots: int, tokens: int, cache_tokens: int, decoder: Decoder) -> None:
        self.base, self.slots, self.tokens, self.decoder = base, slots, max(tokens, slots), decoder
        self._held: set[str] = set()
        self.cache_tokens, self.prefixes = cache_tokens, Prefixes(min(cache_tokens // 4, PREFIXES))
        self._cache = SlotCache(cache_tokens)
        self._free = list(range(slots))  # a heap: low places first keep the cache's used part dense
        self._running: list[Running] = []

    def schedule(self, waiting: deque[Running]) -> list[Chunk]:
        """This step's pieces, those of one adapter together; takes from `waiting` what finds a place."""
        answering = [run for run in self._running if run.pending == 1]
        room = self.tokens - len(answering)
        chunks = [Chunk(run, 1) for run in answering]
        for run in (run for run in self._running if run.pending > 1):
            chunks.append(Chunk(run, min(run.pending, room)))
            room -= chunks[-1].length
            if not room:
                break
        while room and waiting and self._free and self._fits(waiting[0]):
            run = waiting.popleft()
            run.slot = heapq.heappop(self._free)
            self._held = set()
            self._running.append(run)
            self._cache.needed = self._places()
            run.version = self._version(run)
            run.past = self.prefixes.load(run.version, run.ids, self._cache, run.slot)
            chunks.append(Chunk(run, min(run.pending, room)))
            room -= chunks[-1].length
        chunks = [chunk for chunk in chunks if chunk.length]
        if self.decoder.bank is not None and all(chunk.length == 1 for chunk in chunks):
            return sorted(chunks, key=lambda chunk: chunk.running.slot)  # attention reads the cache in this order
        return sorted(chunks, key=lambda chunk: (chunk.running.request.adapter or "", chunk.running.slot))

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [N, V], float32, of the chunks that are their request's last, in order."""
        self._cache.needed = self._places()
        with self._adapters(chunks):
            logits_NV = next_logits(self.base, flat_row(chunks).to(self.base.device), self._cache)
        for chunk in chunks:
            run, was_prompt = chunk.running, chunk.is_last and len(chunk.running.ids) == len(chunk.running.request.ids)
            run.past += chunk.length
            if was_prompt:
                self.prefixes.save(run.version, run.ids, self._cache, run.slot)
        return logits_NV

    @property
    def cache_use(self) -> float:
        """The part of the cache that running requests take, 0 to 1."""
        return sum(len(run.ids) for run in self._running) / self.cache_tokens

    def _fits(self, run: Running) -> bool:
        """Whether there is memory for the longest that this request may get; else it waits, and nothing is dropped."""
        longest = max(other.limit for other in (run, *self._running))
        return not self._running or max(self._places(), self._free[0] + 1) * longest <= self.cache_tokens

    def _places(self) -> int:
        """Places of the cache up to the last that a running request is in."""
        return 1 + max((run.slot for run in self._running), default=-1)

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

    def release(self, run: Running) -> None:
        """The request has ended: its place is free from the next step on."""
        self._running.remove(run)
        heapq.heappush(self._free, run.slot)

    def clear(self) -> None:
        """Forget all requests and what they left: half a step, or what is no number, which a mask does not hide."""
        self._cache.clear()
        self.decoder.clear()
        self._free, self._running, self._held = list(range(self.slots)), [], set()


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


def decoder_of(base: Base) -> Decoder:
    """What decodes this base, made once: in flat rows with a cache, in the bank and as a stack, where that is right.

    Tried on two short texts, which costs as much as six steps. The probe at load tries rows without a cache; some
    families take those with a mask of their own and no `attend`.
    """
    if base.decoding is None:
        decoder = base.decoding = Decoder(base)
        try:
            _try(decoder)
        except BaseException:
            decoder.close()
            raise
    return base.decoding


@torch.no_grad()
def _try(decoder: Decoder) -> None:
    base = decoder.base
    if base.layout != "packed":
        decoder.problem = base.why.get("layout", "")
        return
    words = int(base.model.config.get_text_config().vocab_size)
    ids = [(7 * i + 3) % (words - 2) for i in range(12)]
    texts = ids[:5], ids[5:]
    try:
        expected = hidden(base, _pieces(texts, (0, 0), (5, 7)).to(base.device))[[4, 11]]
        found = _in_pieces(base, texts)
    except _FAILURES as error:
        decoder.problem = _("its attention does not work with a KV cache ({error})", error=first_line(error))
        return
    finally:
        base.router.route(None)
    if not _near(found, expected, base):
        decoder.problem = _("processing a text in pieces gives different results from processing it at once")
        return
    for as_stack in (True, False):
        decoder.group(as_stack)
        why = _difference_of(decoder, texts, expected)
        if not why:
            return
    decoder.ungroup()
    decoder.plain = why


def _difference_of(decoder: Decoder, texts: Sequence[Sequence[int]], expected: Tensor) -> str:
    """Why layers in the bank, or all as a stack, cannot decode; empty where they can."""
    base = decoder.base
    try:
        with decoder.running():
            found = _in_pieces(base, texts)
    except _FAILURES as error:
        return _("it fails with an error: {error}", error=first_line(error))
    finally:
        base.router.route(None)
    return "" if _near(found, expected, base) else _("the optimised forward pass gives different results")


_FAILURES = (ModelError, TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError)


def _in_pieces(base: Base, texts: Sequence[Sequence[int]]) -> Tensor:
    """The last states of two texts whose beginnings went into the cache first."""
    cache = SlotCache()
    hidden(base, _pieces(texts, (0, 0), (4, 1)).to(base.device), cache)
    return hidden(base, _pieces(texts, (4, 1), (5, 7)).to(base.device), cache)[[0, 6]]


def _near(found: Tensor, expected: Tensor, base: Base) -> bool:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return difference <= TOLERANCE[base.dtype]


def _pieces(texts: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int]) -> Row:
    """Tokens [start, end) of each text, whose number is its place in the cache."""
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    offsets = [0, *accumulate(lengths)]
    return Row(
        ids_T=torch.tensor([t for text, a, b in zip(texts, starts, ends, strict=True) for t in text[a:b]]),
        position_T=torch.tensor([i for a, b in zip(starts, ends, strict=True) for i in range(a, b)]),
        spans=tuple(Span(offsets[i], offsets[i + 1], past, i) for i, past in enumerate(starts)),
        counts=(0,) * len(texts),
        at_N=torch.empty(0, dtype=torch.long),
        target_N=torch.empty(0, dtype=torch.long),
        weight_N=torch.empty(0),
        slots=(Slice(None, 0, offsets[-1]),),
    )
