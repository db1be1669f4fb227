"""Fused linears: frozen linear layers that get the same input, such as q, k and v, as one product and one thin product.

Each layer by itself (`LoRALayer.alone`) is the oracle.

T = tokens, I = in_features, O = out_features of all of them together, K = their ranks together
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.fused.products import joined, product, side_by_side, sum_of_products
from lorasmith.lora.router import Router
from lorasmith.lora.update import Update

FEW = 32  # tokens of a decoding step: putting the small matrices together costs more than it saves there
Recompute = tuple[Callable[..., Tensor], Sequence[Tensor]]
_RECOMPUTE = "_lorasmith_recompute"  # on tensors that can_recompute's callers made themselves


def can_recompute(x: Tensor, compute: Callable[..., Tensor], *kept: Tensor) -> None:
    """Note on x that it is compute(*kept), tensors that backward needs anyway, so that x itself need not be kept."""
    setattr(x, _RECOMPUTE, (_version(x), (compute, kept)))


def recompute_of(x: Tensor) -> Recompute | None:
    """How x can be computed again; None where it must be kept."""
    version, recompute = getattr(x, _RECOMPUTE, (None, None))
    return recompute if version == _version(x) else None  # something may have written into it


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class FusedWeights(NamedTuple):
    """Weights of layers with the same input, one below the other, with the widths, ranks and scales of each.

    Their matrices, A [R, I] and B [its O, R] of each, come beside it as `AB`, because autograd must see them.
    """

    W_OI: Tensor
    bias_O: Tensor | None
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def parted(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The matrices of these layers, and what follows them."""
        return tensors[: 2 * len(self.widths)], tensors[2 * len(self.widths) :]

    def forward(self, x_TI: Tensor, AB: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """y = x W^T + b + (x A^T) B^T (LoRA, arXiv:2106.09685, section 4.1) as [T, O], and x A^T as [T, K]."""
        A_KI, B_KO = self._cast(AB, x_TI.dtype)
        h_TK = F.linear(x_TI, A_KI)
        return product(x_TI, self.W_OI.t(), self.bias_O).addmm_(h_TK, B_KO), h_TK

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor, h_TK: Tensor, AB: Sequence[Tensor], of_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x [T, I], one buffer that all products add to, and those of each A and B."""
        A_KI, B_KO = self._cast(AB, x_TI.dtype)
        dh_TK = F.linear(dy_TO, B_KO)
        dx_TI = None
        if of_x:
            dx_TI = sum_of_products(dy_TO.split(self.widths, dim=1), self.W_OI.split(self.widths))
            dx_TI = dx_TI.addmm_(dh_TK, A_KI)
        dA_RI, dB_RO = ((thin_TK.t() @ wide).split(self.ranks) for thin_TK, wide in ((dh_TK, x_TI), (h_TK, dy_TO)))
        dB_RO = [rows.split(self.widths, dim=1)[i] for i, rows in enumerate(dB_RO)]
        pairs = zip(dA_RI, dB_RO, self.scales, strict=True)
        return dx_TI, [g for dA, dB, s in pairs for g in (dA.to(AB[0].dtype), dB.t().to(AB[0].dtype).mul_(s))]

    def _cast(self, AB: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A as one [K, I]; all B, scaled and transposed, as one [K, O] with zeros between them."""
        B_KO = torch.block_diag(*(B.t() * s for B, s in zip(AB[1::2], self.scales, strict=True)))
        return torch.cat(list(AB[0::2])).to(dtype), B_KO.to(dtype)


class AdaptedLinear(torch.autograd.Function):
    """Fused linears. x is saved once, or not at all where `recompute` says how to compute it; W has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, recompute: Recompute | None, weights: FusedWeights, *AB: Tensor
    ) -> tuple[Tensor, ...]:
        """x [..., I] in any floating dtype, A and B in float32 -> each y [..., its O]."""
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO, h_TK = weights.forward(x_TI, AB)
        ctx.compute, kept = recompute or (None, [x_TI])
        ctx.save_for_backward(h_TK, *AB, *kept)
        ctx.weights, ctx.shape = weights, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in y_TO.split(weights.widths, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (where something below it is trained), and of each A and B."""
        h_TK, *saved = ctx.saved_tensors
        AB, kept = ctx.weights.parted(saved)
        x_TI = ctx.compute(*kept).reshape(-1, ctx.shape[-1]) if ctx.compute else kept[0]
        dy_TO = side_by_side([d.reshape(len(x_TI), -1) for d in dy])
        dx_TI, dAB = ctx.weights.backward(dy_TO, x_TI, h_TK, AB, ctx.needs_input_grad[0])
        return None if dx_TI is None else dx_TI.view(ctx.shape), None, None, *dAB


class FusedLinears:
    """Layers that are called with the same tensor one after the other: the first one asked computes for all."""

    def __init__(self, router: Router, layers: Sequence[Any]) -> None:
        self.router, self.layers = router, list(layers)  # LoRALayers, which know these in turn
        self._asked: tuple[Any, ...] = ()
        self._ready: dict[Any, Tensor] = {}

    def weights_for(self, x: Tensor) -> tuple[FusedWeights, list[Tensor]] | None:
        """The layers as one, and their A and B, for the adapter that the router names; None where one pass cannot
        compute them: several adapters, dropout, 4-bit, a variant of LoRA.
        """
        tokens = x.numel() // x.shape[-1]
        slices = self.router.slices_of(tokens)
        adapter = slices[0].adapter
        small = tokens <= FEW and not torch.is_grad_enabled()
        one_pass = self.router.fused and len(slices) == 1 and not small
        updates: list[Update] = []
        for layer in self.layers if one_pass else ():
            if (update := layer.fusable(adapter)) is None:
                return None
            updates.append(update)
        if not updates:
            return None
        weight, bias = joined_weights([one.base_layer for one in self.layers])
        AB: list[Tensor] = [matrix for update in updates for matrix in update.matrices]
        widths, ranks = tuple(len(B) for B in AB[1::2]), tuple(len(A) for A in AB[0::2])
        return FusedWeights(weight, bias, widths, ranks, tuple(update.scaling for update in updates)), AB

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """What `layer` gives for x, or None where one pass cannot compute it."""
        if torch.compiler.is_compiling():  # it cannot follow versions of tensors
            return None
        asked = (x, _version(x), self.router.turn, self.router.active, torch.is_grad_enabled())
        if layer not in self._ready or self._asked[0] is not x or self._asked[1:] != asked[1:]:
            found = self.weights_for(x)
            if found is None:
                self._asked, self._ready = (), {}
                return None
            weights, AB = found
            out = AdaptedLinear.apply(x, recompute_of(x), weights, *AB)  # type: ignore[no-untyped-call]
            self._asked, self._ready = asked, dict(zip(self.layers, out, strict=True))
        y = self._ready.pop(layer)
        if not self._ready:
            self._asked = ()  # x may go
        return y

    def join(self) -> None:
        """Put the weights of plain layers into one buffer."""
        if all(type(one.base_layer) is nn.Linear for one in self.layers):
            joined_weights([one.base_layer for one in self.layers])

    def remove(self, layer: Any) -> None:
        """`layer` is no longer in the model."""
        self.layers.remove(layer)


def joined_weights(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights [O, I] and biases [O] as one; from then on each layer's own is a part of it, so that nothing is twice."""
    optional: list[Tensor | None] = [one.bias for one in linears]
    biases = [bias for bias in optional if bias is not None]  # they are alike in having one
    return _joined([one.weight for one in linears]), _joined(biases) if biases else None


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    whole = joined([p.data for p in parameters], dim=0)
    if whole is None:
        whole = torch.cat([p.data for p in parameters])
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return whole
