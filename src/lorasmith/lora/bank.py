"""The adapters that are in use, beside the frozen weights that they change: for inference, where rows hold many.

    T = tokens, I = inputs, O = outputs of layers that get the same input, C = columns, one for each rank of an adapter
    [y; h] = [W; A] x^T
    y += s B (mask * h)        (LoRA, arXiv:2106.09685, section 4.1, for all adapters at once)

A stands below W in one buffer, so that for a few tokens one product computes both. A token's mask is 1 in the columns
of its own adapter. An adapter is copied in when a request needs it, and over one that nobody needs any more.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.lora.product import product
from lorasmith.lora.router import Router
from lorasmith.lora.siblings import stacked

FEW = 64  # tokens: up to so many, W x^T is up to twice as fast as x W^T on a CPU
# tokens of one adapter: up to so many on average, all adapters go in one product under a mask
THIN = {torch.bfloat16: 64, torch.float16: 64}
STEP = 64  # columns are made room for in multiples of so many


class Change(NamedTuple):
    """What an adapter does to one layer: y += scaling * B A x. A [R, I], B [O, R]."""

    A: Tensor
    B: Tensor
    scaling: float


class Ranks(NamedTuple):
    """An adapter's changes by the path of the layer, read when they are needed; `version` changes when they do."""

    read: Callable[[], Mapping[str, Change]]
    r: int  # the largest rank
    version: Callable[[], Hashable]


class Piece(NamedTuple):
    """Tokens [start, end) of a row use the columns [first, last)."""

    start: int
    end: int
    first: int
    last: int


class Bank:
    """Columns for the adapters of running requests, the same ones in each group of layers."""

    def __init__(self, router: Router, groups: Sequence[Mapping[str, nn.Linear]]) -> None:
        self.router = router
        self.groups = [Together(self, layers) for layers in groups]
        self.paths = frozenset(path for layers in groups for path in layers)  # of layers that compute here
        self.columns = 0
        self.on = False  # layers look here only while the engine runs
        self._at: dict[str, tuple[int, int]] = {}  # adapter -> its columns; the least recently used first
        self._versions: dict[str, Hashable] = {}
        self._turn, self._masks, self._slices = -1, dict[int, Tensor](), list[Piece]()

    def hold(self, adapter: str, ranks: Ranks, needed: Collection[str]) -> bool:
        """Copy the adapter in if it is not there as it is now; whether it had to. `needed`: what must stay."""
        version = ranks.version()
        if self._versions.get(adapter) == version:
            self._at[adapter] = self._at.pop(adapter)
            return False
        self.drop(adapter)
        first = self._room(ranks.r, needed)
        changes = ranks.read()
        for group in self.groups:
            group.put(changes, first, first + ranks.r)
        self._at[adapter], self._versions[adapter] = (first, first + ranks.r), version
        self._turn = -1
        return True

    def has(self, adapters: Iterable[str]) -> bool:
        """Whether all of them have their columns."""
        return all(adapter in self._at for adapter in adapters)

    def drop(self, adapter: str) -> None:
        """Forget the adapter; its columns are free, and empty: a mask does not hide what is no number."""
        self._versions.pop(adapter, None)
        if adapter in self._at:
            first, last = self._at.pop(adapter)
            for group in self.groups:
                group.put({}, first, last)

    def clear(self) -> None:
        """Forget all adapters."""
        for adapter in list(self._at):
            self.drop(adapter)

    def slices(self, tokens: int) -> list[Piece]:
        """The pieces of the row that have an adapter here; found once a forward."""
        if self._turn != self.router.turn:
            routed = self.router.slices_of(tokens)
            self._slices = [Piece(s.start, s.end, *self._at[s.adapter]) for s in routed if s.adapter in self._at]
            self._turn, self._masks = self.router.turn, {}
        return self._slices

    def mask(self, tokens: int, layers: int, like: Tensor) -> Tensor:
        """1 where a token's adapter has a column, [layers * C, T]; made once a forward."""
        pieces = self.slices(tokens)
        if layers not in self._masks:
            mask_CT = torch.zeros(self.columns, tokens)
            for start, end, first, last in pieces:
                mask_CT[first:last, start:end] = 1
            self._masks[layers] = mask_CT.to(like.device, like.dtype).repeat(layers, 1)
        return self._masks[layers]

    def _room(self, r: int, needed: Collection[str]) -> int:
        """The first of r free columns: a gap, or what was least recently used, or new ones."""
        while (gap := self._gap(r)) is None:
            idle = next((name for name in self._at if name not in needed), None)
            if idle is None:
                self._grow(r)
            else:
                self.drop(idle)
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
        self._turn = -1


class Together:
    """Frozen linear layers with the same input, computed as one, each token with its own adapter."""

    def __init__(self, bank: Bank, layers: Mapping[str, nn.Linear]) -> None:
        self.bank, self.layers = bank, layers
        self.W_OI, self.bias_O = stacked(list(layers.values()))
        self.widths = [layer.out_features for layer in layers.values()]
        self.columns = 0
        self._WA, self._B = self.W_OI, self.W_OI.new_zeros(len(self.W_OI), 0)

    @torch.no_grad()
    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O], whose columns may lie next to each other in memory."""
        tokens = len(x_TI)
        slices = self.bank.slices(tokens)
        if tokens <= FEW:
            return self._few(x_TI, bool(slices))
        if slices and tokens <= THIN.get(x_TI.dtype, 16) * len(slices):
            yh = F.linear(x_TI, self._WA)
            y, h = yh[:, : len(self.W_OI)], yh[:, len(self.W_OI) :]
            y.addmm_(h * self.bank.mask(tokens, len(self.widths), x_TI).t(), self._B.t())
            return y if self.bias_O is None else y.add_(self.bias_O)
        y = product(x_TI, self.W_OI.t(), self.bias_O)
        for start, end, first, last in slices:
            A, B = self._A3[:, first:last].flatten(0, 1), self._B3[:, :, first:last].flatten(1)
            y[start:end].addmm_(F.linear(x_TI[start:end], A), B.t())
        return y

    def _few(self, x_TI: Tensor, adapted: bool) -> Tensor:
        tokens = len(x_TI)
        if tokens == 1 and x_TI.dtype != torch.float32:
            x_TI = x_TI.expand(2, -1)  # oneDNN reads a matrix for one vector half as fast as for two
        half, weight = x_TI.dtype in THIN, self._WA if adapted else self.W_OI
        y_OT = torch.mm(weight, x_TI.t()) if half else F.linear(x_TI, weight).t()
        if adapted:
            y_OT, h_CT = y_OT[: len(self.W_OI)], y_OT[len(self.W_OI) :]
            y_OT.addmm_(self._B, h_CT.mul_(self.bank.mask(tokens, len(self.widths), x_TI)))
        if self.bias_O is not None:
            y_OT.add_(self.bias_O[:, None])
        return y_OT[:, :tokens].t()

    def put(self, changes: Mapping[str, Change], first: int, last: int) -> None:
        """Copy an adapter into columns [first, last); a smaller rank is filled up with zeros."""
        A3, B3, row = self._A3, self._B3, 0
        A3[:, first:last] = 0
        B3[:, :, first:last] = 0
        for i, (path, width) in enumerate(zip(self.layers, self.widths, strict=True)):
            if change := changes.get(path):
                r = len(change.A)
                A3[i, first : first + r] = change.A
                B3[row : row + width, i, first : first + r] = change.B * change.scaling
            row += width

    def grow(self, columns: int) -> None:
        """Room for more columns; the layers' weights move into the new buffer."""
        O, I = self.W_OI.shape
        layers, before = len(self.widths), self.columns
        WA, B = self.W_OI.new_zeros(O + layers * columns, I), self.W_OI.new_zeros(O, layers * columns)
        WA[:O] = self.W_OI
        WA[O:].view(layers, columns, I)[:, :before] = self._A3
        B.view(O, layers, columns)[:, :, :before] = self._B3
        self._WA, self._B, self.columns, self.W_OI = WA, B, columns, WA[:O]
        for layer, part in zip(self.layers.values(), self.W_OI.split(self.widths), strict=True):
            layer.weight.data = part

    @property
    def _A3(self) -> Tensor:
        """A of each layer [layers, C, I]."""
        return self._WA[len(self.W_OI) :].view(len(self.widths), self.columns, self.W_OI.shape[1])

    @property
    def _B3(self) -> Tensor:
        """What each column adds to each output [O, layers, C]; zero where it belongs to another layer."""
        return self._B.view(len(self.W_OI), len(self.widths), self.columns)
