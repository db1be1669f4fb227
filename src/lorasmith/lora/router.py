"""Which adapter each token of the row uses: one Router shared by all layers, set before each forward."""

from collections.abc import Sequence
from typing import NamedTuple


class Slice(NamedTuple):
    """Tokens [start, end), counted over all leading dimensions, use `adapter`; None is the base alone."""

    adapter: str | None
    start: int
    end: int


class Router:
    """The current row's slices; without slices every token uses `active`. Switching is one assignment.

    `stacked` asks for all adapters as one product under a mask: the faster form when a row holds few tokens of
    many adapters (decoding); slices are faster when it holds many (training, prefill). Both give the same numbers.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.slices: tuple[Slice, ...] | None = None
        self.stacked = False
        self.turn = 0  # which forward this is
        self.fused = True  # layers with the same input may compute in one pass

    def route(self, slices: Sequence[tuple[str | None, int, int]] | None, stacked: bool = False) -> None:
        """Set the slices of the next forward; None returns to `active` for every token."""
        self.slices = None if slices is None else tuple(Slice(*s) for s in slices)
        self.stacked = stacked
        self.turn += 1

    def slices_of(self, tokens: int) -> tuple[Slice, ...]:
        """The slices of a row of `tokens` tokens. One adapter for all: whatever part of the row a layer sees."""
        if self.slices is None:
            return (Slice(self.active, 0, tokens),)
        if len(self.slices) == 1:
            return (Slice(self.slices[0].adapter, 0, tokens),)
        assert self.slices[-1].end == tokens, f"routed for {self.slices[-1].end} tokens, called with {tokens}"
        return self.slices
