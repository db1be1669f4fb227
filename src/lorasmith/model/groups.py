"""Split the spans of a packed row into groups of query blocks, each of which is one batched attention product.

The blocks of a group have similar lengths and the same number of earlier tokens, so little is computed for padding.

    G = blocks of the group; L = queries of each, padded; S = keys of the longest, earlier tokens included, padded
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.model.row import Span

QUERY_BLOCK = 256  # a longer span is split into blocks, so that no product grows with the square of its length
MAX_PRODUCT = 2**18  # queries x keys of one product, per head: what fits into the cache of a processor
MIN_LENGTH_RATIO = 0.5  # of the shortest block of a group to its longest
ROUND_L, ROUND_S = 16, 32  # L and S are padded to multiples of these


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Query blocks that are computed in one batched product. Made once for a row and used by every layer."""

    keys: Tensor  # row positions of the keys, [G * S]; with a cache, the slots in it, [G]
    longest: int  # S
    position_GL: Tensor  # positions of the queries in their example; [1, L] if all blocks have the same
    from_T: Tensor  # row positions to read the queries from, [G * L]
    to_T: Tensor  # row positions to write the outputs to, [G * L]; for padding, the one behind the row's end
    blocks: int  # G
    past: int = 0  # earlier tokens that every block sees
    cache_slice: slice | None = None  # the slots in the cache, if they are adjacent
    fillers: Tensor | None = None  # which of the G * L queries are padding
    pool: int = 0  # the cache's pool that holds the slots
    row_slice: slice | None = None  # the tokens in the row, if each is a block and they are in order
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int) -> Tensor:
        """True where a query sees a key: [G or 1, 1, repeat * L, S].

        window: of sliding-window attention, in tokens; repeat: query heads per key head.
        """
        key = (window, repeat)
        if key not in self.masks:
            keys_S = torch.arange(self.longest, device=self.position_GL.device)
            self.masks[key] = visible(self.position_GL, keys_S, window)[:, None].repeat(1, 1, repeat, 1)
        return self.masks[key]

    def additive_mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor:
        """The mask as an addend of the scores: 0 or minus infinity. Kept, since torch would make it in every layer."""
        key = ("additive", window, repeat, dtype)
        if key not in self.masks:
            mask = self.mask(window, repeat)
            self.masks[key] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self.masks[key]

    def bias(self, window: int | None, repeat: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """The first key that some query does not see, and the addend of the scores from there on.

        The addend has shape [1, repeat * L, S - first], the same for all blocks: every query of a block sees all
        earlier tokens, unless a window hides them.
        """
        first = 0 if window is not None and window < self.longest else self.past
        key = (window, repeat, dtype)
        if key not in self.masks:
            mask = self.mask(window, repeat)[:, 0, :, first:]
            self.masks[key] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return first, self.masks[key]


class _QueryBlock(NamedTuple):
    start: int
    end: int
    keys: tuple[int, ...]  # row positions of all tokens that its last query sees, itself included

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def past(self) -> int:
        return len(self.keys) - self.length


def visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """True where a query sees a key: not later, and inside the window. [..., L] and [S] -> [..., L, S]."""
    distance = query_position[..., None] - key_position
    is_earlier = distance >= 0
    return is_earlier if window is None else is_earlier & (distance < window)


def attention_groups(spans: Sequence[Span], device: torch.device) -> tuple[AttentionGroup, ...]:
    """The groups of a row without cache. A token sees the earlier ones of its span and its span's ancestors."""
    blocks = sorted(_query_blocks(spans), key=lambda block: (block.past, -block.length, block.start))
    tokens = spans[-1].end if spans else 0
    groups: list[list[_QueryBlock]] = []
    for _past, same_past in groupby(blocks, key=lambda block: block.past):
        groups += _split(list(same_past))
    return tuple(_group(group, tokens, device) for group in groups)


def _query_blocks(spans: Sequence[Span]) -> Iterator[_QueryBlock]:
    visible_to: list[tuple[int, ...]] = []  # row positions by span, the span itself included
    for span in spans:
        earlier = visible_to[span.parent] if span.parent >= 0 else ()
        visible_to.append((*earlier, *range(span.start, span.end)))
        for start in range(span.start, span.end, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, span.end)
            yield _QueryBlock(start, end, visible_to[-1][: len(earlier) + end - span.start])


def _split(blocks: Sequence[_QueryBlock]) -> Iterator[list[_QueryBlock]]:
    """Groups of blocks, given in order of length, within `MIN_LENGTH_RATIO` and `MAX_PRODUCT`."""
    group: list[_QueryBlock] = []
    for block in blocks:
        full = group and (len(group) + 1) * group[0].length * len(group[0].keys) > MAX_PRODUCT
        if group and (full or block.length < MIN_LENGTH_RATIO * group[0].length):
            yield group
            group = []
        group.append(block)
    yield group


def _group(blocks: Sequence[_QueryBlock], tokens: int, device: torch.device) -> AttentionGroup:
    past, longest = blocks[0].past, blocks[0].length
    L = -(-longest // ROUND_L) * ROUND_L if longest > 1 else 1
    S = -(-(past + L) // ROUND_S) * ROUND_S  # a padding query sees a key too, so that its softmax is not 0 / 0
    places = [[*range(b.start, b.end), *[tokens] * (L - b.length)] for b in blocks]
    to = torch.tensor(places, device=device).flatten()
    # padding keys stand behind the positions of all real queries, so that the mask hides them
    keys = [[*b.keys, *[b.keys[-1]] * (S - len(b.keys))] for b in blocks]
    fillers = [i for i, place in enumerate(place for line in places for place in line) if place == tokens]
    return AttentionGroup(
        keys=torch.tensor(keys, device=device).flatten(),
        longest=S,
        position_GL=torch.arange(past, past + L, device=device)[None],
        from_T=to.clamp(max=tokens - 1),
        to_T=to,
        blocks=len(blocks),
        past=past,
        fillers=torch.tensor(fillers, device=device) if fillers else None,
    )
