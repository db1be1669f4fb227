"""The KV cache of the packed layout: a contiguous region per running request, which moves to a larger one as it grows.

    K = places in a pool, C = capacity of a region in tokens, H = key heads, D = head size, T = tokens of the row

Regions of the same capacity form a pool, so that attention can read them in place: gathering blocks, as in paged
attention, would take a quarter of a step (docs/decisions.md). There are few capacities, so a step reads few pools.
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
from lorasmith.system.memory import release_freed_memory

FIRST_CAPACITY = 128  # tokens of the smallest region
# Capacities are powers of two up to here and four steps per power of two beyond: unused space in a long region costs
# more reading time than an additional pool.
LAST_DOUBLED = 1024
KEEP_RATIO, KEEP_TOKENS = 4, 512  # free memory is kept up to this multiple of what is in use, or of this many tokens
RETURN_BYTES = 2**26  # minimum number of freed bytes to return to the system


class Region(NamedTuple):
    """The location of a request's keys and values: the pool, identified by its capacity, and the place in it."""

    capacity: int
    place: int


class Pool:
    """Regions of one capacity: keys and values [K, H, C, D] of each layer."""

    def __init__(self) -> None:
        self.places = 0
        self.free: list[int] = []  # heap of free places; taking the lowest keeps the used ones dense
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of each layer


class KVCache:
    """Implements model.attention.Cache, for regions of at most `limit` tokens in total.

    Tensors are created when a layer first stores keys, since the number of heads and their size may differ by layer.
    Freed regions are not zeroed; old content is overwritten or masked.
    """

    def __init__(self, limit: int = 2**62) -> None:
        self.limit = limit
        self._regions: dict[int, Region] = {}  # by the request's slot
        self._pools: dict[int, Pool] = {}  # by capacity
        self._like: dict[int, tuple[Tensor, Tensor]] = {}  # empty keys and values of each layer, as templates
        self._at: dict[tuple[int, int], Tensor] = {}  # indices by pool and number of heads, see `_places`
        self._spans: dict[int, list[Span]] = {}  # the current row's spans by pool

    @property
    def reserved(self) -> int:
        """Total capacity in tokens of the regions in use."""
        return sum(region.capacity for region in self._regions.values())

    @property
    def allocated(self) -> int:
        """Total capacity in tokens for which memory is allocated."""
        return sum(capacity * pool.places for capacity, pool in self._pools.items())

    def capacity_of(self, tokens: int) -> int:
        """The capacity of the region for a request of this many tokens."""
        step = FIRST_CAPACITY if tokens <= FIRST_CAPACITY else 2 ** (tokens - 1).bit_length()
        if tokens > LAST_DOUBLED:
            step = 2 ** ((tokens - 1).bit_length() - 3)
        return max(min(-(-tokens // step) * step, self.limit), tokens)

    def share(self, requests: int) -> int:
        """The maximum number of tokens per request if this many requests run at once."""
        whole = self.limit // requests
        return next((tokens for tokens in range(whole, 0, -1) if self.capacity_of(tokens) <= whole), 0)

    def region(self, slot: int) -> Region:
        """The region of a request. Requests in the order of their regions are read fastest."""
        return self._regions[slot]

    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for this many tokens of a request, keeping its content.

        Returns False and changes nothing if this would exceed the limit.
        """
        before = self._regions.get(slot)
        if before is not None and tokens <= before.capacity:
            return True
        capacity = self.capacity_of(tokens)
        if self.reserved - (before.capacity if before else 0) + capacity > self.limit:
            return False
        pool = self._pools.setdefault(capacity, Pool())
        if not pool.free:
            more = min((self.limit - self.allocated) // capacity, max(1, pool.places))
            if more < 1:  # free the memory of unused places in other pools
                wanted = {other: region.capacity for other, region in self._regions.items()}
                self._rearrange(wanted | {slot: capacity})
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
        """Free the region of a request."""
        region = self._regions.pop(slot)
        heapq.heappush(self._pools[region.capacity].free, region.place)
        if self.allocated > KEEP_RATIO * max(self.reserved, KEEP_TOKENS):
            self._rearrange({other: region.capacity for other, region in self._regions.items()})

    def clear(self) -> None:
        """Drop all requests and free all memory."""
        self._regions, self._pools = {}, {}
        release_freed_memory()

    def begin(self, spans: Sequence[Span], device: torch.device) -> Sequence[AttentionGroup]:
        """Reserve room for a row's tokens and group its spans for attention. Called once before each forward pass."""
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
        parts.sort(key=lambda pairs: pairs[0][1].start)  # in the order of the row
        return [_group(pairs[0][0], [span for _capacity, span in pairs], spans[-1].end, device) for pairs in parts]

    def extend(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Append the row's keys and values [T, H, D] to the region of each span's slot."""
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
        """Indices [tokens * H] of the row's tokens in a pool that is viewed as [K * H * C, D]."""
        key = capacity, heads
        if key not in self._at:
            starts = [self._regions[span.slot].place * heads * capacity + span.past for span in self._spans[capacity]]
            lengths = [span.length for span in self._spans[capacity]]
            first = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
            head_H = torch.arange(heads, device=device) * capacity
            self._at[key] = (torch.tensor(first, device=device)[:, None] + head_H).flatten()
        return self._at[key]

    def read(self, layer: int, group: AttentionGroup) -> tuple[Tensor, Tensor]:
        """Keys and values [G, H, S, D] of a group, including its new tokens; a view if its places are contiguous."""
        k, v = self._pools[group.pool].layers[layer]
        where = group.keys if group.cache_slice is None else group.cache_slice
        return k[where, :, : group.longest], v[where, :, : group.longest]

    def tensors(self, slot: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Views [H, C, D] of a request's keys and values, with ids (layer, 0) and (layer, 1)."""
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

    def _rearrange(self, capacities: Mapping[int, int]) -> None:
        """Reallocate all pools so that they hold exactly regions of these capacities by slot, keeping their content.

        Works layer by layer, so that at most one layer is allocated twice.
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
        if (old_tokens - self.allocated) * self._bytes() >= RETURN_BYTES:
            release_freed_memory()

    def _bytes(self) -> int:
        """Bytes per token in all layers."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in self._like.values() for t in pair)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in a model of this config."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * int(text.num_hidden_layers) * heads * size * dtype.itemsize


def _zeros(like: tuple[Tensor, Tensor], places: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Zeros [K, H, C, D]: masked values are multiplied by 0, and 0 * NaN is NaN, so memory must be initialized."""
    k, v = (t.new_zeros(places, t.shape[1], capacity, t.shape[3]) for t in like)
    return k, v


def _group(pool: int, spans: Sequence[Span], tokens: int, device: torch.device) -> AttentionGroup:
    """A group for one chunk of a prompt, or for single tokens in the order of their places.

    `spans` have places instead of slots. To read the cache in place, unused places between them are read too, with a
    dummy query, unless these are the majority.
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
