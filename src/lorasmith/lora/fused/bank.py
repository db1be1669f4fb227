"""The adapter bank: all adapters that running requests use, applied to a batch in one pass (inference only).

    T = tokens, I = inputs, O = outputs of the L layers with the same input, C = columns, one per unit of rank
    y = W x^T + s B (mask * A x^T)        (LoRA, arXiv:2106.09685, section 4.1, for all adapters at once)

An adapter's slot is a range of columns, and a token's mask is 1 in the columns of its own adapter. An adapter is copied
into the bank when a request needs it, replacing the least recently used one that is idle. A has L rows for each column;
the rows of one adapter are adjacent, layer by layer, so the part in use is a prefix of A and of B. Only plain low-rank
updates can be in the bank (see update.py). The reference implementation is `LoRALayer.unfused`.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.lora.fused.linears import fuse_weights
from lorasmith.lora.fused.products import FEW_TOKENS, prepacked, product, product_of_few, product_of_packed
from lorasmith.lora.router import Router

# Up to this many tokens per adapter on average, one masked product for all adapters is faster than one product each.
MASKED_TOKENS = {torch.bfloat16: 64, torch.float16: 64}
# An adapter's columns take at most so many times its own size, or this part of the weights' size, or so many bytes.
OWN_SHARE, WEIGHT_SHARE, LEAST_BYTES = 8, 8, 2**24
COLUMN_STEP = 64  # the bank grows in multiples of this many columns
AdapterSlot = tuple[int, int]  # an adapter's columns [first, last)


class Factors(NamedTuple):
    """The low-rank factors of one layer: y += B A x. B is transposed and already multiplied by the scaling."""

    A_RI: Tensor
    B_RO: Tensor


class AdapterWeights(NamedTuple):
    """The factors of an adapter by the path of the layer, read on demand."""

    read: Callable[[], Mapping[str, Factors]]
    r: int  # the largest rank
    version: Callable[[], Hashable]  # returns another value once the weights have changed


class BankSlice(NamedTuple):
    """Tokens [start, end) of a row use the columns [first, last)."""

    start: int
    end: int
    first: int
    last: int


class AdapterBank:
    """Slots for the adapters of running requests. An adapter has the same columns in every group of layers."""

    def __init__(self, router: Router, groups: Sequence[Mapping[str, nn.Linear]]) -> None:
        self.router = router
        self.groups = [BankedLinears(self, layers) for layers in groups]
        self._order = [path for layers in groups for path in layers]
        self.paths = frozenset(self._order)  # layers that are computed in the bank
        self._weight_bytes = sum(group.W_OI.nbytes for group in self.groups)
        self.columns = 0
        self._at: dict[str, AdapterSlot] = {}  # adapter -> its columns, least recently used first
        self._views: dict[AdapterSlot, list[Factors]] = {}  # the parts of A and B for each layer; all else is zero
        self._versions: dict[str, Hashable] = {}
        self._turn, self._masks, self._slices, self.used = -1, dict[int, Tensor](), list[BankSlice](), 0

    def suits(self, weights: AdapterWeights) -> bool:
        """Whether the adapter takes no disproportionate memory here, where all layers get columns for its largest rank.

        An adapter of a few layers with a high rank does; it is better computed in the model.
        """
        column = sum(len(group.widths) * sum(group.in_and_out) for group in self.groups)
        own = sum(matrix.nbytes for factors in weights.read().values() for matrix in factors)
        element = max(factors.A_RI.element_size() for factors in weights.read().values())
        return weights.r * column * element <= max(OWN_SHARE * own, self._weight_bytes // WEIGHT_SHARE, LEAST_BYTES)

    def hold(self, adapter: str, ranks: AdapterWeights, needed: Collection[str]) -> bool:
        """Copy the adapter into the bank unless its current version is there; returns whether it was copied.

        Adapters in `needed` are not evicted.
        """
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
        """Copy an adapter's matrices in a single call: the call overhead dominates the time of a switch."""
        if slot not in self._views:
            self._empty(slot)
            others = {p: views for p, views in self._views.items() if p[1] <= slot[0] or slot[1] <= p[0]}
            self._views = {**others, slot: [view for group in self.groups for view in group.views(*slot)]}
        to, of = list[Tensor](), list[Tensor]()
        for path, (A, B) in zip(self._order, self._views[slot], strict=True):
            r = len(changes[path].A_RI) if path in changes else 0
            if r < len(A):  # a layer with a smaller rank than the adapter's largest, or one that is not adapted
                A.zero_()
                B.zero_()
                A, B = A[:r], B[:r]
            if r:
                to += A, B
                of += changes[path]
        if to:
            torch._foreach_copy_(to, of)

    def has(self, adapters: Iterable[str]) -> bool:
        """Whether all these adapters are in the bank."""
        return all(adapter in self._at for adapter in adapters)

    def drop(self, adapter: str) -> None:
        """Remove the adapter and zero its columns: the mask would not hide a NaN left there."""
        self._versions.pop(adapter, None)
        if adapter in self._at:
            self._empty(self._at.pop(adapter))

    def shrink(self) -> None:
        """Give the memory of columns back that no adapter has, if they are the larger part."""
        used = max((end for _start, end in self._at.values()), default=0)
        columns = -(-used // COLUMN_STEP) * COLUMN_STEP
        if columns <= self.columns // 2:
            self._resize(columns)

    def clear(self) -> None:
        """Remove all adapters."""
        self._at, self._versions = {}, {}
        self._empty((0, self.columns))

    def _empty(self, slot: AdapterSlot) -> None:
        for group in self.groups:
            for part in group.columns(*slot):
                part.zero_()

    def prepack(self) -> None:
        """Replace the weights of the groups in use by oneDNN's packed format, until `unpack`."""
        for group in self.groups:
            if self.paths.issuperset(group.layers):
                group.prepack()

    def unpack(self) -> None:
        """Restore the weights of all layers."""
        for group in self.groups:
            group.unpack()

    def slices(self, tokens: int) -> list[BankSlice]:
        """The slices of a row whose adapter is in the bank; computed once per forward pass."""
        if self._turn != self.router.turn:
            routed = self.router.slices_of(tokens)
            self._slices = [BankSlice(s.start, s.end, *self._at[s.adapter]) for s in routed if s.adapter in self._at]
            last = max((piece.last for piece in self._slices), default=0)
            # rounded to a power of two, because each distinct size needs its own kernel
            self.used = min(1 << (last - 1).bit_length(), self.columns) if last else 0
            self._turn, self._masks = self.router.turn, {}
        return self._slices

    def mask(self, tokens: int, layers: int, like: Tensor) -> Tensor:
        """[used * L, T] in `like`'s dtype: 1 in the columns of a token's adapter. Computed once per forward pass."""
        pieces = self.slices(tokens)
        if layers not in self._masks:
            mask_CT = torch.zeros(self.used, tokens)
            for start, end, first, last in pieces:
                mask_CT[first:last, start:end] = 1
            self._masks[layers] = mask_CT.to(like.device, like.dtype).repeat_interleave(layers, 0)
        return self._masks[layers]

    def _room(self, r: int, needed: Collection[str]) -> int:
        """The first of r free columns: in a gap, in place of idle adapters, or at the end after growing."""
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
        self._resize(-(-max(used + r, 2 * self.columns) // COLUMN_STEP) * COLUMN_STEP)

    def _resize(self, columns: int) -> None:
        self.columns = columns
        for group in self.groups:
            group.resize(columns)
        self._turn, self._views = -1, {}


class BankedLinears:
    """Frozen linear layers with the same input, computed as one, each token with its own adapter.

    The layers' weights become views of one fused weight; while it is packed for oneDNN they are empty.
    """

    def __init__(self, bank: AdapterBank, layers: Mapping[str, nn.Linear]) -> None:
        self.bank, self.layers = bank, layers
        self.W_OI, self.bias_O = fuse_weights(list(layers.values()))
        self.packed: Tensor | None = None  # in oneDNN's format
        self.widths = [layer.out_features for layer in layers.values()]
        self._A_KI, self._B_KO = (self.W_OI.new_zeros(0, size) for size in reversed(self.W_OI.shape))
        self._in_use = 0, self._A_KI, self._B_KO  # number of columns in use, and A and B up to there

    @torch.no_grad()
    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]. The result may be column-major."""
        tokens, slices = len(x_TI), self.bank.slices(len(x_TI))
        if self.packed is not None:
            y_TO = product_of_packed(x_TI, self.packed, self.bias_O)
        else:
            y_TO = product_of_few(x_TI, self.W_OI) if tokens <= FEW_TOKENS else product(x_TI, self.W_OI.t())
            y_TO = y_TO if self.bias_O is None else y_TO.add_(self.bias_O)
        if slices and (tokens <= FEW_TOKENS or tokens <= MASKED_TOKENS.get(x_TI.dtype, 16) * len(slices)):
            return self._add_under_mask(y_TO, x_TI)
        for start, end, first, last in slices:
            A_KI, B_KO = self.columns(first, last)
            y_TO[start:end].addmm_(F.linear(x_TI[start:end], A_KI), B_KO)
        return y_TO

    def _add_under_mask(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        if self._in_use[0] != self.bank.used:  # cached, since slicing costs as much as a small product
            self._in_use = self.bank.used, *self.columns(0, self.bank.used)
        _used, A_KI, B_KO = self._in_use
        h_KT = torch.mm(A_KI, x_TI.t()).mul_(self.bank.mask(len(x_TI), len(self.widths), x_TI))
        return y_TO.addmm_(h_KT.t(), B_KO)

    def prepack(self) -> None:
        """Keep W only in oneDNN's packed format, if the processor supports it; calling a single layer then fails."""
        if self.packed is None and (packed := prepacked(self.W_OI)) is not None:
            # a weight without rows makes such a call fail; with one on the meta device F.linear returns garbage
            self.packed, self.W_OI = packed, self.W_OI.new_empty(0, self.W_OI.shape[1])
            self._put_weights([self.W_OI for _width in self.widths])

    def unpack(self) -> None:
        """Restore the weights of the layers, bit for bit."""
        if self.packed is not None:
            self.W_OI, self.packed = self.packed.to_dense(), None
            self._put_weights(self.W_OI.split(self.widths))

    def _put_weights(self, parts: Sequence[Tensor]) -> None:
        for layer, part_OI in zip(self.layers.values(), parts, strict=True):
            layer.weight.data = part_OI  # keeps the Parameter object

    def columns(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """A [K, I] and B [K, O] of these columns, where K = L rows per column."""
        n = len(self.widths)
        return self._A_KI[first * n : last * n], self._B_KO[first * n : last * n]

    def views(self, first: int, last: int) -> Iterator[Factors]:
        """The parts of A and B in these columns that belong to each layer."""
        (A_KI, B_KO), r, column = self.columns(first, last), last - first, 0
        for i, width in enumerate(self.widths):
            rows = slice(i * r, (i + 1) * r)
            yield Factors(A_KI[rows], B_KO[rows, column : column + width])
            column += width

    @property
    def in_and_out(self) -> tuple[int, int]:
        """The number of inputs, and of the outputs of all layers."""
        return self._A_KI.shape[1], self._B_KO.shape[1]

    def resize(self, columns: int) -> None:
        """Give A and B this many columns; the content of those that stay is kept."""
        before = self._A_KI, self._B_KO
        self._A_KI, self._B_KO = (old.new_zeros(len(self.widths) * columns, old.shape[1]) for old in before)
        for new, old in zip((self._A_KI, self._B_KO), before, strict=True):
            kept = min(len(new), len(old))
            new[:kept] = old[:kept]
        self._in_use = 0, self._A_KI[:0], self._B_KO[:0]
