"""Frozen linear layers that get the same input, such as q, k and v, as one: one product, one thin product.

T = tokens, I = in_features, O = out_features of all of them together, K = their ranks together
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.product import joined, product, side_by_side, sum_of_products
from lorasmith.lora.router import Router

FEW = 32  # tokens of a decoding step: putting the small matrices together costs more than it saves there
Again = Callable[[], Tensor]
_AGAIN = "_lorasmith_again"


def can_be_made_again(x: Tensor, again: Again) -> None:
    """Note on x how to compute it again, from what is kept for backward anyway, so that x itself need not be kept."""
    setattr(x, _AGAIN, (_version(x), again))


def _again_of(x: Tensor) -> Again | None:
    version, again = getattr(x, _AGAIN, (None, None))
    return again if version == _version(x) else None  # something may have written into it


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for stacked layers (LoRA, arXiv:2106.09685, section 4.1); the scale is in B.

    x is saved once, or not at all where `again` computes it; its gradient is one buffer that all products add to; no
    gradient of W is formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        again: Again | None,
        W_OI: Tensor,
        bias: Tensor | None,
        scales: Sequence[float],
        *AB: Tensor,
    ) -> tuple[Tensor, ...]:
        """x [..., I] in any floating dtype, each A [R, I] and B [its O, R] in float32 -> each y [..., its O]."""
        x_TI, widths = x.reshape(-1, x.shape[-1]), [len(B) for B in AB[1::2]]
        A_KI = torch.cat(AB[0::2]).to(x.dtype)
        B_KO = torch.block_diag(*(B.t() * s for B, s in zip(AB[1::2], scales, strict=True))).to(x.dtype)
        h_TK = F.linear(x_TI, A_KI)
        y_TO = product(x_TI, W_OI.t(), bias).addmm_(h_TK, B_KO)
        ctx.save_for_backward(None if again else x_TI, h_TK, A_KI, B_KO)
        ctx.again, ctx.W_OI, ctx.widths, ctx.scales, ctx.shape = again, W_OI, widths, scales, x.shape
        ctx.ranks, ctx.dtype = [len(A) for A in AB[0::2]], AB[0].dtype
        return tuple(y.view(*x.shape[:-1], -1) for y in y_TO.split(widths, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (where something below it is trained), and of each A and B."""
        x_TI, h_TK, A_KI, B_KO = ctx.saved_tensors
        x_TI = ctx.again().view(-1, A_KI.shape[1]) if x_TI is None else x_TI
        dy_TO = side_by_side([d.reshape(len(x_TI), -1) for d in dy])
        dh_TK = F.linear(dy_TO, B_KO)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = sum_of_products(dy_TO.split(ctx.widths, dim=1), ctx.W_OI.split(ctx.widths))
            dx_TI = dx_TI.addmm_(dh_TK, A_KI).view(ctx.shape)
        dA_RI = (dh_TK.t() @ x_TI).to(ctx.dtype).split(ctx.ranks)
        dB_RO = [rows.split(ctx.widths, dim=1)[i] for i, rows in enumerate((h_TK.t() @ dy_TO).split(ctx.ranks))]
        pairs = zip(dA_RI, dB_RO, ctx.scales, strict=True)
        return dx_TI, None, None, None, None, *(g for dA, dB, s in pairs for g in (dA, dB.t().to(ctx.dtype).mul_(s)))


class Siblings:
    """Layers that are called with the same tensor one after the other: the first one asked computes for all."""

    def __init__(self, router: Router, layers: Sequence[Any]) -> None:
        self.router, self.layers = router, list(layers)  # LoRALayers, which know their siblings in turn
        self._asked: tuple[Any, ...] = ()
        self._ready: dict[Any, Tensor] = {}

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """What `layer` gives for x, or None where one pass cannot compute it: several adapters, dropout, 4-bit."""
        tokens = x.numel() // x.shape[-1]
        slices = self.router.slices_of(tokens)
        adapter = slices[0].adapter
        small = tokens <= FEW and not torch.is_grad_enabled()
        one_pass = self.router.fused and len(slices) == 1 and not small
        if not one_pass or not all(one.is_plain(adapter) for one in self.layers):
            self._asked, self._ready = (), {}
            return None
        asked = (x, _version(x), self.router.turn, adapter, torch.is_grad_enabled())
        if layer not in self._ready or self._asked[0] is not x or self._asked[1:] != asked[1:]:
            weight, bias = stacked([one.base_layer for one in self.layers])
            scales = [one.scaling[adapter] for one in self.layers]
            AB = [matrix for one in self.layers for matrix in one.matrices(adapter)]
            out = AdaptedLinear.apply(x, _again_of(x), weight, bias, scales, *AB)  # type: ignore[no-untyped-call]
            self._asked, self._ready = asked, dict(zip(self.layers, out, strict=True))
        y = self._ready.pop(layer)
        if not self._ready:
            self._asked = ()  # x may go
        return y

    def stack(self) -> None:
        """Put the weights of plain layers into one buffer."""
        if all(type(one.base_layer) is nn.Linear for one in self.layers):
            stacked([one.base_layer for one in self.layers])

    def remove(self, layer: Any) -> None:
        """`layer` is no longer in the model."""
        self.layers.remove(layer)


def stacked(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights [O, I] and biases [O] as one; from then on each layer's own is a part of it, so that nothing is twice."""
    optional: list[Tensor | None] = [one.bias for one in linears]
    biases = [bias for bias in optional if bias is not None]  # siblings are alike in having one
    return _stacked([one.weight for one in linears]), _stacked(biases) if biases else None


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    whole = joined([p.data for p in parameters], dim=0)
    if whole is None:
        whole = torch.cat([p.data for p in parameters])
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return whole
