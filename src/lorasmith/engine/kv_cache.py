"""The key/value cache of the packed layout: a region for each running request, which moves to a larger one as it grows.

    K = places of a pool, C = capacity of its regions in tokens, H = key heads, D = head size, T = tokens of the row

Regions of one capacity stand beside each other in a pool, so that attention reads them where they are: gathering blocks
would cost a quarter of a step (docs/decisions.md). Capacities are few, so that a step reads few pools.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lorasmith.model.groups import AttentionGroup
from lorasmith.model.row import Span
from lorasmith.system.device import give_back_memory

FIRST_CAPACITY = 128  # tokens of the smallest region
DOUBLED = 1024  # up to here capacities double; beyond, a quarter is added, since there reading costs more than a pool
KEPT, SMALL = 4, 512  # memory is kept for later requests up to so many times what is in use, or this many tokens
RETURNED = 2**26  # bytes that are worth being handed back to the system


class Region(NamedTuple):
    """Where a request's keys and values are: a pool by its capacity, and the place in it."""

    capacity: int
    place: int


class Pool:
    """Regions of one capacity: keys and values [K, H, C, D] of each layer."""

    def __init__(self) -> None:
        self.places = 0
        self.free: list[int] = []  # a heap: low places first keep the used part dense
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}


class KVCache:
    """model.attention.Cache whose requests have at most `limit` tokens together, their spare places counted.

    Tensors are made at each layer's first keys: heads and sizes may differ. A region is free again when its request
    ends; what it held is overwritten or masked.
    """

    def __init__(self, limit: int = 2**62) -> None:
        self.limit = limit
        self._regions: dict[int, Region] = {}  # by the request's slot
        self._pools: dict[int, Pool] = {}
        self._like: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of each layer for no place at all
        self._at: dict[tuple[int, int], Tensor] = {}  # of a pool and its heads: see `_places`
        self._spans: dict[int, list[Span]] = {}  # of the row, by pool

    @property
    def reserved(self) -> int:
        """Tokens of the regions that requests have."""
        return sum(region.capacity for region in self._regions.values())

    @property
    def allocated(self) -> int:
        """Tokens that memory is taken for."""
        return sum(capacity * pool.places for capacity, pool in self._pools.items())

    def capacity_of(self, tokens: int) -> int:
        """What a request of so many tokens takes."""
        step = FIRST_CAPACITY if tokens <= FIRST_CAPACITY else 2 ** (tokens - 1).bit_length()
        if tokens > DOUBLED:
            step = 2 ** ((tokens - 1).bit_length() - 3)
        return max(min(-(-tokens // step) * step, self.limit), tokens)

    def share(self, requests: int) -> int:
        """Tokens that each of so many requests can have at once."""
        whole = self.limit // requests
        return next((tokens for tokens in range(whole, 0, -1) if self.capacity_of(tokens) <= whole), 0)

    def region(self, slot: int) -> Region:
        """That of a request; regions in their order are read fastest."""
        return self._regions[slot]

    def reserve(self, slot: int, tokens: int) -> bool:
        """Room for so many tokens of a request; what it has stays. False, and nothing changes, beyond the limit."""
        before = self._regions.get(slot)
        if before is not None and tokens <= before.capacity:
            return True
        capacity = self.capacity_of(tokens)
        if self.reserved - (before.capacity if before else 0) + capacity > self.limit:
            return False
        pool = self._pools.setdefault(capacity, Pool())
        if not pool.free:
            more = min((self.limit - self.allocated) // capacity, max(1, pool.places))
            if more < 1:  # what nobody needs makes room
                wanted = {other: region.capacity for other, region in self._regions.items()}
                self._arrange(wanted | {slot: capacity})
                return True
            self._grow(capacity, pool, pool.places + more)
        region = Region(capacity, heapq.heappop(pool.free))
        if before is not None:
            for layer, pair in self._pools[before.capacity].layers.items():
                for old, new in zip(pair, pool.layers[layer], strict=True):
                    new[region.place, :, : before.capacity] = old[before.place]
            heapq.heappush(self._pools[before.capacity].free, before.place)
        self._regions[slot] = region
        return True

    def release(self, slot: int) -> None:
        """The request needs it no more."""
        region = self._regions.pop(slot)
        heapq.heappush(self._pools[region.capacity].free, region.place)
        if self.allocated > KEPT * max(self.reserved, SMALL):
            self._arrange({other: region.capacity for other, region in self._regions.items()})

    def clear(self) -> None:
        """Forget everything, but for which layers there are."""
        self._regions, self._pools = {}, {}
        give_back_memory()

    def begin(self, spans: Sequence[Span], device: torch.device) -> Sequence[AttentionGroup]:
        """Make room for a row's tokens and group its spans: once, before its forward."""
        self._spans, self._at = {}, {}
        for span in spans:
            has_room = self.reserve(span.slot, span.past + span.length)
            assert has_room, "the schedule admits no more than there is room for"
            self._spans.setdefault(self._regions[span.slot].capacity, []).append(span)
        placed = [(self._regions[span.slot], span) for span in spans]
        own = [(capacity, span._replace(slot=place)) for (capacity, place), span in placed]
        single = sorted((pair for pair in own if pair[1].length == 1), key=lambda pair: pair[0])
        parts = [list(pairs) for _capacity, pairs in groupby(single, key=lambda pair: pair[0])]
        parts += [[pair] for pair in own if pair[1].length > 1]
        parts.sort(key=lambda pairs: pairs[0][1].start)  # as they stand in the row
        return [_group(pairs[0][0], [span for _capacity, span in pairs], spans[-1].end, device) for pairs in parts]

    def extend(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Append the row's keys and values behind what each span's slot holds."""
        if layer not in self._like:
            k, v = (t.new_empty(0, t.shape[1], 0, t.shape[2]) for t in (k_THD, v_THD))
            self._like[layer] = k, v
            for capacity, pool in self._pools.items():
                pool.layers[layer] = _zeros(self._like[layer], pool.places, capacity)
        for capacity, spans in self._spans.items():
            at = self._places(capacity, k_THD.shape[1], k_THD.device)
            is_row = spans[-1].end - spans[0].start == len(at) // k_THD.shape[1]
            for store, new in zip(self._pools[capacity].layers[layer], (k_THD, v_THD), strict=True):
                own = (
                    new[spans[0].start : spans[-1].end] if is_row else torch.cat([new[s.start : s.end] for s in spans])
                )
                store.view(-1, store.shape[3]).index_copy_(0, at, own.reshape(-1, store.shape[3]))

    def _places(self, capacity: int, heads: int, device: torch.device) -> Tensor:
        """Of the row's tokens in a pool seen as [K * H * C, D], [tokens * H]."""
        key = capacity, heads
        if key not in self._at:
            starts = [self._regions[span.slot].place * heads * capacity + span.past for span in self._spans[capacity]]
            lengths = [span.length for span in self._spans[capacity]]
            first = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
            head_H = torch.arange(heads, device=device) * capacity
            self._at[key] = (torch.tensor(first, device=device)[:, None] + head_H).flatten()
        return self._at[key]

    def read(self, layer: int, group: AttentionGroup) -> tuple[Tensor, Tensor]:
        """Keys and values [G, H, S, D] of a group, its new tokens included; a view where its places are neighbours."""
        k, v = self._pools[group.pool].layers[layer]
        where = group.keys if group.cache_slice is None else group.cache_slice
        return k[where, :, : group.longest], v[where, :, : group.longest]

    def tensors(self, slot: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """All keys (0) and values (1) of a request by layer, [H, C, D]: views."""
        region = self._regions[slot]
        for layer, pair in self._pools[region.capacity].layers.items():
            yield from (((layer, i), tensor[region.place]) for i, tensor in enumerate(pair))

    def _grow(self, capacity: int, pool: Pool, places: int) -> None:
        for layer, like in self._like.items():
            made = _zeros(like, places, capacity)
            if pool.places:
                for new, old in zip(made, pool.layers[layer], strict=True):
                    new[: pool.places] = old
            pool.layers[layer] = made
        for place in range(pool.places, places):
            heapq.heappush(pool.free, place)
        pool.places = places

    def _arrange(self, capacities: Mapping[int, int]) -> None:
        """Regions of these capacities by slot, and no other memory; what the requests have stays.

        Layer by layer, so that at no time more is taken than before or after and one layer.
        """
        before, old_pools, old_tokens = self._regions, self._pools, self.allocated
        order = sorted(capacities, key=lambda slot: before.get(slot, Region(2**62, 0)))
        self._regions, self._pools = {}, {}
        for slot in order:
            pool = self._pools.setdefault(capacities[slot], Pool())
            self._regions[slot] = Region(capacities[slot], pool.places)
            pool.places += 1
        for layer, like in self._like.items():
            for capacity, pool in self._pools.items():
                pool.layers[layer] = _zeros(like, pool.places, capacity)
            for slot in before.keys() & capacities.keys():
                (capacity, place), (old_capacity, old_place) = self._regions[slot], before[slot]
                kept, pair = min(capacity, old_capacity), old_pools[old_capacity].layers[layer]
                for new, old in zip(self._pools[capacity].layers[layer], pair, strict=True):
                    new[place, :, :kept] = old[old_place, :, :kept]
            for pool in old_pools.values():
                pool.layers.pop(layer, None)
        if (old_tokens - self.allocated) * self._bytes() >= RETURNED:
            give_back_memory()

    def _bytes(self) -> int:
        """Of one token in all layers."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in self._like.values() for t in pair)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What keys and values of one token take in a model of this config."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * int(text.num_hidden_layers) * heads * size * dtype.itemsize


def _zeros(like: tuple[Tensor, Tensor], places: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Zeros, because a masked key weighs 0, and 0 times garbage may be NaN."""
    k, v = (t.new_zeros(places, t.shape[1], capacity, t.shape[3]) for t in like)
    return k, v


def _group(pool: int, spans: Sequence[Span], tokens: int, device: torch.device) -> AttentionGroup:
    """One piece of a prompt, or single tokens in the order of their places, so that the cache is read in place.

    `spans` with their places for slots. Idle places between them are read too, with a filler for a query, unless they
    are the greater part.
    """
    by_place = {span.slot: span for span in spans}
    low, high = min(by_place), max(by_place) + 1
    is_dense = high - low <= 2 * len(spans)
    places = list(range(low, high)) if is_dense else sorted(by_place)
    filler = Span(tokens, tokens + 1)
    chosen = [by_place.get(place, filler) for place in places]
    to = [i for span in chosen for i in range(span.start, span.end)]
    is_in_order = all(span.length == 1 for span in chosen) and to == list(range(to[0], to[0] + len(to)))
    return AttentionGroup(
        pool=pool,
        keys=torch.tensor(places, device=device),
        cache_slice=slice(low, high) if is_dense else None,
        longest=max(span.past + span.length for span in spans),
        position_GL=torch.tensor([[span.past + i for i in range(span.length)] for span in chosen], device=device),
        from_T=torch.tensor([min(i, tokens - 1) for i in to], device=device),
        to_T=torch.tensor(to, device=device),
        blocks=len(chosen),
        row_slice=slice(to[0], to[-1] + 1) if is_in_order and to[-1] < tokens else None,
    )
