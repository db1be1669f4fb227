"""The adapter bank: the adapters that are in use, beside the frozen weights that they change, for inference.

    T = tokens, I = inputs, O = outputs of the L layers that get the same input, C = columns, one for each rank
    y = W x^T + s B (mask * A x^T)        (LoRA, arXiv:2106.09685, section 4.1, for all adapters at once)

An adapter's slot is a range of columns. A token's mask is 1 in those of its own adapter. An adapter is copied in when a
request needs it, over one that nobody needs any more. A has L rows for each column, those of one adapter together
(layer by layer), so that what is in use of A and B is one piece from their beginning. Each layer by itself
(`LoRALayer.alone`) is the oracle. Only plain low rank can be here: see update.py.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.lora.fused.linears import joined_weights
from lorasmith.lora.fused.products import FEW, prepacked, product, product_of_few, product_of_packed
from lorasmith.lora.router import Router

# tokens of one adapter: up to so many on average, all adapters go in one product under a mask
THIN = {torch.bfloat16: 64, torch.float16: 64}
STEP = 64  # columns are made room for in multiples of so many
AdapterSlot = tuple[int, int]  # an adapter's columns [first, last)


class Factors(NamedTuple):
    """What an adapter does to one layer: y += B A x, the scaling already in B, which lies transposed."""

    A_RI: Tensor
    B_RO: Tensor


class AdapterWeights(NamedTuple):
    """An adapter's changes by the path of the layer, read when they are needed; `version` changes when they do."""

    read: Callable[[], Mapping[str, Factors]]
    r: int  # the largest rank
    version: Callable[[], Hashable]


class BankSlice(NamedTuple):
    """Tokens [start, end) of a row use the columns [first, last)."""

    start: int
    end: int
    first: int
    last: int


class AdapterBank:
    """Slots for the adapters of running requests, the same ones in each group of layers."""

    def __init__(self, router: Router, groups: Sequence[Mapping[str, nn.Linear]]) -> None:
        self.router = router
        self.groups = [BankedLinears(self, layers) for layers in groups]
        self._order = [path for layers in groups for path in layers]
        self.paths = frozenset(self._order)  # of layers that compute here
        self.columns = 0
        self._at: dict[str, AdapterSlot] = {}  # adapter -> its columns; the least recently used first
        self._views: dict[AdapterSlot, list[Factors]] = {}  # where each layer's matrices go; around them: zeros
        self._versions: dict[str, Hashable] = {}
        self._turn, self._masks, self._slices, self.used = -1, dict[int, Tensor](), list[BankSlice](), 0

    def hold(self, adapter: str, ranks: AdapterWeights, needed: Collection[str]) -> bool:
        """Copy the adapter in if it is not there as it is now; whether it had to. `needed`: what must stay."""
        version = ranks.version()
        if self._versions.get(adapter) == version:
            self._at[adapter] = self._at.pop(adapter)
            return False
        self.drop(adapter)
        first = self._room(ranks.r, needed)
        self._put(ranks.read(), (first, first + ranks.r))
        self._at[adapter], self._versions[adapter] = (first, first + ranks.r), version
        self._turn = -1
        return True

    @torch.no_grad()
    def _put(self, changes: Mapping[str, Factors], slot: AdapterSlot) -> None:
        """Copy an adapter in, all matrices in one call: a switch is mostly the time of the calls."""
        if slot not in self._views:
            self._empty(slot)
            others = {p: views for p, views in self._views.items() if p[1] <= slot[0] or slot[1] <= p[0]}
            self._views = {**others, slot: [view for group in self.groups for view in group.views(*slot)]}
        to, of = list[Tensor](), list[Tensor]()
        for path, (A, B) in zip(self._order, self._views[slot], strict=True):
            r = len(changes[path].A_RI) if path in changes else 0
            if r < len(A):  # a smaller rank than the adapter's largest, or a layer that it leaves as it is
                A.zero_()
                B.zero_()
                A, B = A[:r], B[:r]
            if r:
                to += A, B
                of += changes[path]
        if to:
            torch._foreach_copy_(to, of)

    def has(self, adapters: Iterable[str]) -> bool:
        """Whether all of them have their columns."""
        return all(adapter in self._at for adapter in adapters)

    def drop(self, adapter: str) -> None:
        """Forget the adapter; its columns are free, and empty: a mask does not hide what is no number."""
        self._versions.pop(adapter, None)
        if adapter in self._at:
            self._empty(self._at.pop(adapter))

    def clear(self) -> None:
        """Forget all adapters."""
        self._at, self._versions = {}, {}
        self._empty((0, self.columns))

    def _empty(self, slot: AdapterSlot) -> None:
        for group in self.groups:
            for part in group.columns(*slot):
                part.zero_()

    def prepack(self) -> None:
        """Keep the weights of the groups that are in use in oneDNN's order, and no other, until `unpack`."""
        for group in self.groups:
            if self.paths.issuperset(group.layers):
                group.prepack()

    def unpack(self) -> None:
        """Give all layers their weights back."""
        for group in self.groups:
            group.unpack()

    def slices(self, tokens: int) -> list[BankSlice]:
        """The pieces of the row that have an adapter here; found once a forward."""
        if self._turn != self.router.turn:
            routed = self.router.slices_of(tokens)
            self._slices = [BankSlice(s.start, s.end, *self._at[s.adapter]) for s in routed if s.adapter in self._at]
            last = max((piece.last for piece in self._slices), default=0)
            self.used = min(1 << (last - 1).bit_length(), self.columns) if last else 0  # few sizes: each is a kernel
            self._turn, self._masks = self.router.turn, {}
        return self._slices

    def mask(self, tokens: int, layers: int, like: Tensor) -> Tensor:
        """1 where a token's adapter has a column, [used * L, T]; made once a forward."""
        pieces = self.slices(tokens)
        if layers not in self._masks:
            mask_CT = torch.zeros(self.used, tokens)
            for start, end, first, last in pieces:
                mask_CT[first:last, start:end] = 1
            self._masks[layers] = mask_CT.to(like.device, like.dtype).repeat_interleave(layers, 0)
        return self._masks[layers]

    def _room(self, r: int, needed: Collection[str]) -> int:
        """The first of r free columns: a gap, or what was least recently used, or new ones."""
        while (gap := self._gap(r)) is None:
            idle = next((name for name in self._at if name not in needed), None)
            if idle is None:
                self._grow(r)
            else:
                del self._at[idle], self._versions[idle]
        return gap

    def _gap(self, r: int) -> int | None:
        first = 0
        for start, end in sorted(self._at.values()):
            if start - first >= r:
                return first
            first = end
        return first if self.columns - first >= r else None

    def _grow(self, r: int) -> None:
        used = max((end for _start, end in self._at.values()), default=0)
        self.columns = -(-max(used + r, 2 * self.columns) // STEP) * STEP
        for group in self.groups:
            group.grow(self.columns)
        self._turn, self._views = -1, {}


class BankedLinears:
    """Frozen linear layers with the same input, computed as one, each token with its own adapter."""

    def __init__(self, bank: AdapterBank, layers: Mapping[str, nn.Linear]) -> None:
        self.bank, self.layers = bank, layers
        self.W_OI, self.bias_O = joined_weights(list(layers.values()))
        self.packed: Tensor | None = None  # where it is, the layers have no weights
        self.widths = [layer.out_features for layer in layers.values()]
        self._A_KI, self._B_KO = (self.W_OI.new_zeros(0, size) for size in reversed(self.W_OI.shape))
        self._in_use = 0, self._A_KI, self._B_KO  # columns up to the last one in use

    @torch.no_grad()
    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O], whose columns may lie next to each other in memory."""
        tokens, slices = len(x_TI), self.bank.slices(len(x_TI))
        if self.packed is not None:
            y_TO = product_of_packed(x_TI, self.packed, self.bias_O)
        else:
            y_TO = product_of_few(x_TI, self.W_OI) if tokens <= FEW else product(x_TI, self.W_OI.t())
            y_TO = y_TO if self.bias_O is None else y_TO.add_(self.bias_O)
        if slices and (tokens <= FEW or tokens <= THIN.get(x_TI.dtype, 16) * len(slices)):
            return self._add_under_mask(y_TO, x_TI)
        for start, end, first, last in slices:
            A_KI, B_KO = self.columns(first, last)
            y_TO[start:end].addmm_(F.linear(x_TI[start:end], A_KI), B_KO)
        return y_TO

    def _add_under_mask(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        if self._in_use[0] != self.bank.used:  # a slice costs as much as a small product
            self._in_use = self.bank.used, *self.columns(0, self.bank.used)
        _used, A_KI, B_KO = self._in_use
        h_KT = torch.mm(A_KI, x_TI.t()).mul_(self.bank.mask(len(x_TI), len(self.widths), x_TI))
        return y_TO.addmm_(h_KT.t(), B_KO)

    def prepack(self) -> None:
        """Keep W in oneDNN's order alone, if the processor has it; a layer called by itself fails then."""
        if self.packed is None and (packed := prepacked(self.W_OI)) is not None:
            # no rows: for a weight on the meta device F.linear gives garbage without a word
            self.packed, self.W_OI = packed, self.W_OI.new_empty(0, self.W_OI.shape[1])
            self._put_weights([self.W_OI for _width in self.widths])

    def unpack(self) -> None:
        """Give the layers their weights back, bit for bit."""
        if self.packed is not None:
            self.W_OI, self.packed = self.packed.to_dense(), None
            self._put_weights(self.W_OI.split(self.widths))

    def _put_weights(self, parts: Sequence[Tensor]) -> None:
        for layer, part_OI in zip(self.layers.values(), parts, strict=True):
            layer.weight.data = part_OI  # the parameter stays the same

    def columns(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """A [K, I] and B [K, O] of these columns, K = L for each."""
        n = len(self.widths)
        return self._A_KI[first * n : last * n], self._B_KO[first * n : last * n]

    def views(self, first: int, last: int) -> Iterator[Factors]:
        """Where in these columns the matrices of each layer go."""
        (A_KI, B_KO), r, column = self.columns(first, last), last - first, 0
        for i, width in enumerate(self.widths):
            rows = slice(i * r, (i + 1) * r)
            yield Factors(A_KI[rows], B_KO[rows, column : column + width])
            column += width

    def grow(self, columns: int) -> None:
        """Room for more columns; what is in them stays."""
        before = self._A_KI, self._B_KO
        self._A_KI, self._B_KO = (old.new_zeros(len(self.widths) * columns, old.shape[1]) for old in before)
        for new, old in zip((self._A_KI, self._B_KO), before, strict=True):
            new[: len(old)] = old
        self._in_use = 0, self._A_KI[:0], self._B_KO[:0]
