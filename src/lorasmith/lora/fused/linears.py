"""Fused linears: frozen linear layers with the same input, such as q, k and v, computed and trained as one.

    T = tokens, I = in_features, O = sum of the layers' out_features, K = sum of their ranks

The reference implementation is `LoRALayer.unfused`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.fused.products import adjacent, concat_columns, product, sum_of_products
from lorasmith.lora.quantized import QuantizedLinear
from lorasmith.lora.quantized_weight import QuantizedWeight
from lorasmith.lora.router import Router
from lorasmith.lora.update import Update

DECODING_TOKENS = 32  # up to this many tokens, concatenating the small matrices costs more than fusing saves
Recompute = tuple[Callable[..., Tensor], Sequence[Tensor]]
_RECOMPUTE = "_lorasmith_recompute"  # attribute of tensors passed to mark_recomputable


def mark_recomputable(x: Tensor, compute: Callable[..., Tensor], *kept: Tensor) -> None:
    """Record that x equals compute(*kept), where backward needs `kept` anyway, so that x itself need not be saved."""
    setattr(x, _RECOMPUTE, (_version(x), (compute, kept)))


def recompute_of(x: Tensor) -> Recompute | None:
    """How to recompute x in backward, or None if x must be saved."""
    version, recompute = getattr(x, _RECOMPUTE, (None, None))
    return recompute if version == _version(x) else None  # x may have been modified in place since


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class FusedWeights(NamedTuple):
    """The stacked weights of layers with the same input, and the width, rank and scaling of each.

    Their LoRA matrices, A [R, I] and B [O of the layer, R], are passed separately as `AB`, so that autograd sees them.
    Quantized weights are not stacked, but each is converted when it is used.
    """

    W_OI: Tensor | Sequence[QuantizedWeight]
    bias_O: Tensor | None
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def split_AB(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Split off the A and B of these layers: (AB, remaining tensors)."""
        return tensors[: 2 * len(self.widths)], tensors[2 * len(self.widths) :]

    def forward(self, x_TI: Tensor, AB: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """y = x W^T + b + (x A^T) B^T (LoRA, arXiv:2106.09685, section 4.1) as [T, O], and x A^T as [T, K]."""
        A_KI, B_KO = self._cast(AB, x_TI.dtype)
        h_TK = F.linear(x_TI, A_KI)
        return self._of_frozen(x_TI).addmm_(h_TK, B_KO), h_TK

    def backward(
        self, dy_TO: Tensor, x_TI: Tensor, h_TK: Tensor, AB: Sequence[Tensor], needs_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x [T, I] (None unless `needs_dx`), accumulated in one buffer, and those of each A and B."""
        A_KI, B_KO = self._cast(AB, x_TI.dtype)
        dh_TK = F.linear(dy_TO, B_KO)
        dx_TI = None
        if needs_dx:
            dx_TI = self._back_through_frozen(dy_TO).addmm_(dh_TK, A_KI)
        dA_RI, dB_RO = ((thin_TK.t() @ wide).split(self.ranks) for thin_TK, wide in ((dh_TK, x_TI), (h_TK, dy_TO)))
        dB_RO = [rows.split(self.widths, dim=1)[i] for i, rows in enumerate(dB_RO)]
        pairs = zip(dA_RI, dB_RO, self.scales, strict=True)
        return dx_TI, [g for dA, dB, s in pairs for g in (dA.to(AB[0].dtype), dB.t().to(AB[0].dtype).mul_(s))]

    def _of_frozen(self, x_TI: Tensor) -> Tensor:
        """x W^T + b."""
        if isinstance(self.W_OI, Tensor):
            return product(x_TI, self.W_OI.t(), self.bias_O)
        y_TO = x_TI.new_empty(len(x_TI), sum(self.widths))
        for part, columns_TO in zip(self.W_OI, y_TO.split(self.widths, dim=1), strict=True):
            part.product(x_TI, columns_TO)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)

    def _back_through_frozen(self, dy_TO: Tensor) -> Tensor:
        """dy W."""
        parts_TO = dy_TO.split(self.widths, dim=1)
        if isinstance(self.W_OI, Tensor):
            return sum_of_products(parts_TO, self.W_OI.split(self.widths))
        dx_TI = dy_TO.new_zeros(len(dy_TO), self.W_OI[0].shape[1])
        for part, columns_TO in zip(self.W_OI, parts_TO, strict=True):
            part.add_product(columns_TO, dx_TI)
        return dx_TI

    def _cast(self, AB: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A stacked as [K, I]; all B, scaled and transposed, as a block-diagonal [K, O]."""
        B_KO = torch.block_diag(*(B.t() * s for B, s in zip(AB[1::2], self.scales, strict=True)))
        return torch.cat(list(AB[0::2])).to(dtype), B_KO.to(dtype)


class AdaptedLinear(torch.autograd.Function):
    """The autograd function. x is saved once, or not at all if it can be recomputed; W gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, recompute: Recompute | None, weights: FusedWeights, *AB: Tensor
    ) -> tuple[Tensor, ...]:
        """x [..., I] in any floating dtype, A and B in float32 -> y [..., O of the layer] for each layer."""
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO, h_TK = weights.forward(x_TI, AB)
        ctx.compute, kept = recompute or (None, [x_TI])
        ctx.save_for_backward(h_TK, *AB, *kept)
        ctx.weights, ctx.shape = weights, x.shape
        # no views, as autograd refuses to change outputs in place that are: Llama 4 adds to one
        parts = torch.unsafe_split_with_sizes(y_TO, weights.widths, dim=1)
        return tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (if required) and of each A and B."""
        h_TK, *saved = ctx.saved_tensors
        AB, kept = ctx.weights.split_AB(saved)
        x_TI = ctx.compute(*kept).reshape(-1, ctx.shape[-1]) if ctx.compute else kept[0]
        dy_TO = concat_columns([d.reshape(len(x_TI), -1) for d in dy])
        dx_TI, dAB = ctx.weights.backward(dy_TO, x_TI, h_TK, AB, ctx.needs_input_grad[0])
        return None if dx_TI is None else dx_TI.view(ctx.shape), None, None, *dAB


class FusedLinears:
    """Layers that are called with the same tensor one after the other: the first call computes the outputs of all."""

    def __init__(self, router: Router, layers: Sequence[Any]) -> None:
        self.router, self.layers = router, list(layers)  # LoRALayers, which refer back to this object
        self._call: tuple[Any, ...] = ()
        self._ready: dict[Any, Tensor] = {}

    def weights_for(self, x: Tensor) -> tuple[FusedWeights, list[Tensor]] | None:
        """The fused weights, and the A and B of the adapter that the router selects.

        None if the layers cannot be fused for this call: several adapters, dropout, a LoRA variant.
        """
        tokens = x.numel() // x.shape[-1]
        slices = self.router.slices_of(tokens)
        adapter = slices[0].adapter
        small = tokens <= DECODING_TOKENS and not torch.is_grad_enabled()
        one_pass = self.router.fused and len(slices) == 1 and not small
        updates: list[Update] = []
        for layer in self.layers if one_pass else ():
            if (update := layer.fusable(adapter)) is None:
                return None
            updates.append(update)
        if not updates:
            return None
        weight, bias = _frozen([one.base_layer for one in self.layers])
        if weight is None:
            return None
        AB: list[Tensor] = [matrix for update in updates for matrix in update.matrices]
        widths, ranks = tuple(len(B) for B in AB[1::2]), tuple(len(A) for A in AB[0::2])
        return FusedWeights(weight, bias, widths, ranks, tuple(update.scaling for update in updates)), AB

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """The output of `layer` for x, or None if it must be computed unfused."""
        # torch.compile cannot trace tensor versions, and autocast does not reach into a product with `out=`
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or self.router.beside:
            return None
        call = (x, _version(x), self.router.turn, self.router.active, torch.is_grad_enabled())
        if layer not in self._ready or self._call[0] is not x or self._call[1:] != call[1:]:
            found = self.weights_for(x)
            if found is None:
                self._call, self._ready = (), {}
                return None
            weights, AB = found
            out = AdaptedLinear.apply(x, recompute_of(x), weights, *AB)  # type: ignore[no-untyped-call]
            self._call, self._ready = call, dict(zip(self.layers, out, strict=True))
        y = self._ready.pop(layer)
        if not self._ready:
            self._call = ()  # lets x be freed
        return y

    def fuse(self) -> None:
        """Move the weights of plain nn.Linear layers into one buffer."""
        if all(type(one.base_layer) is nn.Linear for one in self.layers):
            fuse_weights([one.base_layer for one in self.layers])

    def remove(self, layer: Any) -> None:
        """Remove `layer`, which is no longer in the model."""
        self.layers.remove(layer)


def _frozen(linears: Sequence[nn.Linear]) -> tuple[Tensor | list[QuantizedWeight] | None, Tensor | None]:
    """The weights and biases of these layers: stacked, or a list if they are quantized. None if only some are."""
    quantized = [one.quantized for one in linears if isinstance(one, QuantizedLinear)]
    if not quantized:
        return fuse_weights(linears)
    if len(quantized) < len(linears):
        return None, None
    optional: list[Tensor | None] = [one.bias for one in linears]
    biases = [bias for bias in optional if bias is not None]
    return quantized, torch.cat(biases) if biases else None


def fuse_weights(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The stacked weight [O, I] and bias [O]. The layers' parameters become views of them, so nothing is duplicated."""
    optional: list[Tensor | None] = [one.bias for one in linears]
    biases = [bias for bias in optional if bias is not None]  # either all layers have one or none has
    return _fuse([one.weight for one in linears]), _fuse(biases) if biases else None


def _fuse(parameters: Sequence[Tensor]) -> Tensor:
    whole = adjacent([p.data for p in parameters], dim=0)
    if whole is None:
        whole = torch.cat([p.data for p in parameters])
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return whole
