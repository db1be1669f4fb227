"""The key/value cache of the packed layout: one place per running request, grown when a reply grows.

K = places, C = capacity in tokens, H = key heads, D = head size, T = tokens of the row
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lorasmith.model.group import Group
from lorasmith.model.row import Span

FIRST_CAPACITY = 128  # tokens


class SlotCache:
    """model.attention.Cache in tensors [K, H, C, D], made at each layer's first keys: heads and sizes may differ.

    A place is free again when its request ends; what it held is overwritten or masked. Requests lie in one piece each,
    so that attention reads them where they are: gathering blocks would cost a quarter of a step (docs/decisions.md).
    """

    def __init__(self, limit: int = 2**62) -> None:
        self.limit, self.needed = limit, 0  # tokens in all; places that running requests are in
        self.places, self.capacity = 0, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._at: dict[int, Tensor] = {}  # heads -> the row's places in a cache seen as [K * H * C, D], [T * H]
        self._spans: Sequence[Span] = ()

    def begin(self, spans: Sequence[Span], device: torch.device) -> Sequence[Group]:
        """Make room for a row's tokens and group its spans: once, before its forward."""
        self.grow(1 + max(span.slot for span in spans), max(span.past + span.length for span in spans))
        self._spans, self._at = spans, {}
        single = [span for span in spans if span.length == 1]
        pieces = [_group([span], spans[-1].end, device) for span in spans if span.length > 1]
        return (*([_group(single, spans[-1].end, device)] if single else []), *pieces)

    def extend(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Append the row's keys and values behind what each span's slot holds."""
        if layer not in self._layers:
            shape = self.places, k_THD.shape[1], self.capacity
            self._layers[layer] = (k_THD.new_zeros(*shape, k_THD.shape[2]), v_THD.new_zeros(*shape, v_THD.shape[2]))
        at = self._places(k_THD.shape[1], k_THD.device)
        for store, new in zip(self._layers[layer], (k_THD, v_THD), strict=True):
            store.view(-1, store.shape[3]).index_copy_(0, at, new.reshape(-1, store.shape[3]))

    def _places(self, heads: int, device: torch.device) -> Tensor:
        if heads not in self._at:
            spans, size = self._spans, heads * self.capacity
            first = [span.slot * size + span.past + i for span in spans for i in range(span.length)]
            head_H = torch.arange(heads, device=device) * self.capacity
            self._at[heads] = (torch.tensor(first, device=device)[:, None] + head_H).flatten()
        return self._at[heads]

    def read(self, layer: int, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [G, H, S, D] of a group, its new tokens included; a view where its places are neighbours."""
        k, v = self._layers[layer]
        where = group.keys if group.where is None else group.where
        return k[where, :, : group.longest], v[where, :, : group.longest]

    def tensors(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """All keys (0) and values (1) by layer, [K, H, C, D]."""
        for layer, pair in self._layers.items():
            yield from (((layer, i), tensor) for i, tensor in enumerate(pair))

    def clear(self) -> None:
        """Forget everything, but for which layers there are."""
        self.places = self.capacity = self.needed = 0
        self._layers = {layer: (k[:0, :, :0].clone(), v[:0, :, :0].clone()) for layer, (k, v) in self._layers.items()}

    def grow(self, places: int, tokens: int) -> None:
        """Room for so many requests of so many tokens; what is there stays."""
        if places <= self.places and tokens <= self.capacity:
            return
        before = self.places, self.capacity
        self.places = before[0] if places <= before[0] else max(places, 2 * before[0])
        self.capacity = before[1] if tokens <= before[1] else max(tokens, 2 * before[1], FIRST_CAPACITY)
        if self.places * self.capacity > self.limit:  # what nobody needs makes room
            self.places = max(places, self.needed)
            self.capacity = max(tokens, min(self.capacity, self.limit // self.places))
        kept = min(before[0], self.places), min(before[1], self.capacity)
        for layer, pair in self._layers.items():
            k, v = (t.new_zeros(self.places, t.shape[1], self.capacity, t.shape[3]) for t in pair)
            for new, old in zip((k, v), pair, strict=True):
                # zeros behind: a masked key weighs 0, and 0 times garbage may be NaN
                new[: kept[0], :, : kept[1]] = old[: kept[0], :, : kept[1]]
            self._layers[layer] = (k, v)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What keys and values of one token take in a model of this config."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * int(text.num_hidden_layers) * heads * size * dtype.itemsize


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
        is_row=to == list(range(tokens)) and all(span.length == 1 for span in chosen),
    )
