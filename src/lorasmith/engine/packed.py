"""Continuous batching: every step is one flat row of prompt pieces and newest tokens, sorted by adapter."""

import heapq
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorasmith.engine.kv import SlotCache
from lorasmith.engine.request import Chunk, Running
from lorasmith.errors import ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden
from lorasmith.model.head import next_logits
from lorasmith.model.probe import TOLERANCE
from lorasmith.model.row import Row, Span


class Packed:
    """At most `slots` requests at once and `tokens` tokens a step; a request joins or leaves at any step.

    Requests that already answer come first, one token each; the rest of the step goes to prompts, the oldest first.
    """

    def __init__(self, base: Base, slots: int, tokens: int) -> None:
        self.base, self.tokens = base, max(tokens, slots)
        self._cache = SlotCache(slots)
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
        while room and waiting and self._free:
            run = waiting.popleft()
            run.slot = heapq.heappop(self._free)
            self._running.append(run)
            chunks.append(Chunk(run, min(run.pending, room)))
            room -= chunks[-1].length
        chunks = [chunk for chunk in chunks if chunk.length]
        return sorted(chunks, key=lambda chunk: (chunk.running.request.adapter or "", chunk.running.slot))

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [N, V], float32, of the chunks that are their request's last, in order."""
        logits_NV = next_logits(self.base, flat_row(chunks).to(self.base.device), self._cache)
        for run, length in chunks:
            run.past += length
        return logits_NV

    def release(self, run: Running) -> None:
        """The request has ended: its place is free from the next step on."""
        self._running.remove(run)
        heapq.heappush(self._free, run.slot)


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


def packing_problem(base: Base) -> str | None:
    """Why this model cannot decode in flat rows with a cache, or None: tried on two short texts, in pieces and whole.

    The probe at load tries rows without a cache; some families take those with a mask of their own and no `attend`.
    Tried once for each model: it costs as much as three steps.
    """
    if base.model not in _found:
        _found[base.model] = _try_pieces(base)
    return _found[base.model]


_found: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


@torch.no_grad()
def _try_pieces(base: Base) -> str | None:
    words = int(base.model.config.get_text_config().vocab_size)
    ids = [(7 * i + 3) % (words - 2) for i in range(12)]
    texts = ids[:5], ids[5:]
    whole, cache = _pieces(texts, (0, 0), (5, 7)).to(base.device), SlotCache(2)
    try:
        expected = hidden(base, whole)[[4, 11]]
        hidden(base, _pieces(texts, (0, 0), (4, 1)).to(base.device), cache)
        found = hidden(base, _pieces(texts, (4, 1), (5, 7)).to(base.device), cache)[[0, 6]]
    except (ModelError, TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        return _("its attention cannot be given a cache ({error})", error=first_line(error))
    finally:
        base.router.route(None)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return None if difference <= TOLERANCE[base.dtype] else _("in pieces it does not compute what it computes at once")


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
