"""The key/value cache of the packed layout: one place per running request, grown when a reply grows.

K = places, H = key heads, C = capacity in tokens, D = head size, T = tokens of the row
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.model.group import Group
from lorasmith.model.row import Span

FIRST_CAPACITY = 128  # tokens


class SlotCache:
    """model.attention.Cache in tensors [K, H, C, D], made at each layer's first keys: heads and sizes may differ.

    A place is free again when its request ends; what it held is overwritten or masked.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.capacity = slots, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._slot_T = self._position_T = torch.empty(0, dtype=torch.long)

    def begin(self, spans: Sequence[Span], device: torch.device) -> Sequence[Group]:
        """Make room for a row's tokens and group its spans: once, before its forward."""
        self._grow(max(span.past + span.length for span in spans))
        slots = [span.slot for span in spans for _token in range(span.length)]
        positions = [span.past + i for span in spans for i in range(span.length)]
        self._slot_T = torch.tensor(slots, device=device)
        self._position_T = torch.tensor(positions, device=device)
        single = [span for span in spans if span.length == 1]
        pieces = [_group([span], spans[-1].end, device) for span in spans if span.length > 1]
        return (*([_group(single, spans[-1].end, device)] if single else []), *pieces)

    def extend(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Append the row's keys and values behind what each span's slot holds."""
        if layer not in self._layers:
            k, v = (t.new_zeros(self.slots, t.shape[1], self.capacity, t.shape[2]) for t in (k_THD, v_THD))
            self._layers[layer] = (k, v)
        for store, new in zip(self._layers[layer], (k_THD, v_THD), strict=True):
            store[self._slot_T, :, self._position_T] = new

    def read(self, layer: int, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [G, H, S, D] of a group, its new tokens included; a view where its places are neighbours."""
        k, v = self._layers[layer]
        where = group.keys if group.where is None else group.where
        return k[:, :, : group.longest][where], v[:, :, : group.longest][
            group.keys if group.where is None else group.where
        ]

    def _grow(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        before, self.capacity = self.capacity, max(tokens, 2 * self.capacity, FIRST_CAPACITY)
        for layer, pair in self._layers.items():
            k, v = (t.new_zeros(*t.shape[:2], self.capacity, t.shape[3]) for t in pair)
            for new, old in zip((k, v), pair, strict=True):
                new[:, :, :before] = old  # zeros behind: a masked key weighs 0, and 0 times garbage may be NaN
            self._layers[layer] = (k, v)


def _group(spans: Sequence[Span], tokens: int, device: torch.device) -> Group:
    """One piece of a prompt, or single tokens in the order of their places, so that the cache is read in place.

    Idle places between them are read too, with a filler for a query, unless they are the greater part.
    """
    by_slot = {span.slot: span for span in spans}
    low, high = min(by_slot), max(by_slot) + 1
    dense = high - low <= 2 * len(spans)
    slots = list(range(low, high)) if dense else sorted(by_slot)
    filler = Span(tokens, tokens + 1)
    chosen = [by_slot.get(slot, filler) for slot in slots]
    to = [i for span in chosen for i in range(span.start, span.end)]
    return Group(
        keys=torch.tensor(slots, device=device),
        where=slice(low, high) if dense else None,
        longest=max(span.past + span.length for span in spans),
        position_GL=torch.tensor([[span.past + i for i in range(span.length)] for span in chosen], device=device),
        from_T=torch.tensor([min(i, tokens - 1) for i in to], device=device),
        to_T=torch.tensor(to, device=device),
        pieces=len(chosen),
    )
