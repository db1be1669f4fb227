"""The router tells all LoRA layers which adapter each token of a batch uses. It is set before each forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

from lorasmith.errors import AdapterError
from lorasmith.i18n import _


class Slice(NamedTuple):
    """Tokens [start, end), counted over all leading dimensions, use `adapter`; None is the base model."""

    adapter: str | None
    start: int
    end: int


class Router:
    """The slices of the current forward pass; without slices, every token uses the adapter `active`.

    `partial` are adapters that need slices, which `model/row.py` and the engine make.

    `stacked` makes layers compute all adapters in one masked product, which is faster for few tokens of many adapters
    (decoding). Otherwise they compute slice by slice, which is faster for many tokens (training, prefill).
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.beside: tuple[str, ...] = ()  # more adapters that are active for every token; their updates add up
        self.slices: tuple[Slice, ...] | None = None
        self.stacked = False
        self.partial: set[str] = set()  # aLoRA adapters, which compute only some tokens of a text (see alora.py)
        self.turn = 0  # number of the forward pass, to invalidate what is cached within one
        self.fused = True  # whether layers with the same input may be fused

    def route(self, slices: Sequence[tuple[str | None, int, int]] | None, stacked: bool = False) -> None:
        """Set the slices of the next forward pass; None returns to `active` for every token."""
        self.slices = None if slices is None else tuple(Slice(*s) for s in slices)
        self.stacked = stacked
        self.turn += 1

    def activate(self, names: Sequence[str]) -> None:
        """Make these adapters active, for every token of a forward pass without slices."""
        self.active, self.beside = (names[0], tuple(names[1:])) if names else (None, ())
        self.turn += 1

    def passes(self, tokens: int) -> tuple[tuple[Slice, ...], ...]:
        """The slices of an input; several if several adapters are active, each of which adds its updates in turn."""
        if self.slices is not None or not self.beside:
            return (self.slices_of(tokens),)
        return tuple((Slice(name, 0, tokens),) for name in (self.active, *self.beside))

    def slices_of(self, tokens: int) -> tuple[Slice, ...]:
        """The slices of an input of `tokens` tokens, which may be part of the batch if that uses a single adapter."""
        if self.slices is None:
            assert not self.beside, "several adapters are active: see passes"
            if self.active in self.partial:
                raise AdapterError(
                    _(
                        "adapter {name!r} is an aLoRA, and a call of the model itself does not tell from which token "
                        "on it is active. Generate or score with lorasmith instead.",
                        name=self.active,
                    )
                )
            return (Slice(self.active, 0, tokens),)
        if len(self.slices) == 1:
            return (Slice(self.slices[0].adapter, 0, tokens),)
        assert self.slices[-1].end == tokens, f"routed for {self.slices[-1].end} tokens, called with {tokens}"
        return self.slices
