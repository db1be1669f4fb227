"""Which pieces of a row attend in one product: alike in length, and behind equally many earlier tokens.

G = pieces of the group, fillers included; L = new tokens of each; S = keys of the longest, the earlier included
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.model.row import Span

PIECE = 256  # queries of one piece: longer spans attend in several, so that no product grows with the square
PRODUCT = 2**18  # queries x keys of one product, per head: what stays in the cache of a processor
ALIKE = 0.5  # the shortest piece of a group, to its longest
ROUND_L, ROUND_S = 16, 32


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces that attend together. What it holds is made once a row, not once a layer."""

    keys: Tensor  # the G * S places in the row of the keys; with a cache, the G places in it, or `where` is them
    longest: int  # S
    position_GL: Tensor  # one line where it is the same for all pieces
    from_T: Tensor  # G * L places in the row to take queries from
    to_T: Tensor  # and to put outputs to; a filler's is one behind the row's end
    pieces: int  # G
    past: int = 0  # earlier tokens that each sees
    where: slice | None = None  # the G places in the cache, where they are neighbours
    fillers: Tensor | None = None  # places among the G * L that are no token's
    pool: int = 0  # which part of the cache its places are in
    rows: slice | None = None  # its tokens in the row, where each is one piece and they are in order
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int) -> Tensor:
        """True where a query sees a key, [G or 1, 1, repeat * L, S]."""
        key = (window, repeat)
        if key not in self.masks:
            keys_S = torch.arange(self.longest, device=self.position_GL.device)
            self.masks[key] = visible(self.position_GL, keys_S, window)[:, None].repeat(1, 1, repeat, 1)
        return self.masks[key]

    def added(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores: 0, or minus infinity. Torch would make it anew in every layer."""
        key = ("added", window, repeat, dtype)
        if key not in self.masks:
            mask = self.mask(window, repeat)
            self.masks[key] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self.masks[key]

    def bias(self, window: int | None, repeat: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """From which key on something is hidden, and there 0 for a key that a query sees, else minus infinity.

        [1, repeat * L, S - first], the same for all pieces: what is earlier than a piece is seen by all of it.
        """
        first = 0 if window is not None and window < self.longest else self.past
        key = (window, repeat, dtype)
        if key not in self.masks:
            mask = self.mask(window, repeat)[:, 0, :, first:]
            self.masks[key] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return first, self.masks[key]


class _Piece(NamedTuple):
    start: int
    end: int
    keys: tuple[int, ...]  # places of all that it sees, itself included

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def past(self) -> int:
        return len(self.keys) - self.length


def visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """True where a query sees a key: not later, and inside the window. [..., L] and [S] -> [..., L, S]."""
    distance = query_position[..., None] - key_position
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def grouped(spans: Sequence[Span], device: torch.device) -> tuple[Group, ...]:
    """The groups of a row without cache. A span sees what it continues, and itself."""
    pieces = sorted(_pieces(spans), key=lambda piece: (piece.past, -piece.length, piece.start))
    tokens = spans[-1].end if spans else 0
    groups: list[list[_Piece]] = []
    for _past, alike in groupby(pieces, key=lambda piece: piece.past):
        groups += _split(list(alike))
    return tuple(_group(group, tokens, device) for group in groups)


def _pieces(spans: Sequence[Span]) -> Iterator[_Piece]:
    seen: list[tuple[int, ...]] = []  # by each span, itself included
    for span in spans:
        earlier = seen[span.parent] if span.parent >= 0 else ()
        seen.append((*earlier, *range(span.start, span.end)))
        for start in range(span.start, span.end, PIECE):
            end = min(start + PIECE, span.end)
            yield _Piece(start, end, seen[-1][: len(earlier) + end - span.start])


def _split(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours in length, as many as one product may hold."""
    group: list[_Piece] = []
    for piece in pieces:
        full = group and (len(group) + 1) * group[0].length * len(group[0].keys) > PRODUCT
        if group and (full or piece.length < ALIKE * group[0].length):
            yield group
            group = []
        group.append(piece)
    yield group


def _group(pieces: Sequence[_Piece], tokens: int, device: torch.device) -> Group:
    past, longest = pieces[0].past, pieces[0].length
    L = -(-longest // ROUND_L) * ROUND_L if longest > 1 else 1
    S = -(-(past + L) // ROUND_S) * ROUND_S  # a filler sees a key too, so that nothing is 0 / 0
    places = [[*range(p.start, p.end), *[tokens] * (L - p.length)] for p in pieces]
    to = torch.tensor(places, device=device).flatten()
    # a key that is not there stands behind all positions of real queries, so that the mask hides it from them
    keys = [[*p.keys, *[p.keys[-1]] * (S - len(p.keys))] for p in pieces]
    fillers = [i for i, place in enumerate(place for line in places for place in line) if place == tokens]
    return Group(
        keys=torch.tensor(keys, device=device).flatten(),
        longest=S,
        position_GL=torch.arange(past, past + L, device=device)[None],
        from_T=to.clamp(max=tokens - 1),
        to_T=to,
        pieces=len(pieces),
        past=past,
        fillers=torch.tensor(fillers, device=device) if fillers else None,
    )
