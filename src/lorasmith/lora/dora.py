"""DoRA: weight-decomposed low-rank adaptation (arXiv:2402.09353, equation 5).

    y = m / ||W + s B A|| * (W x + s B A x) + bias        one norm per output feature

LoRA sets the direction of each row of the weight and a trained vector m its length. The norm is treated as a constant
in backward (section 4.3).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasmith.i18n import _
from lorasmith.lora.update import Update

if TYPE_CHECKING:
    from lorasmith.lora.layer import LoRALayer

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name


class DoRA(Update):
    """The DoRA update. m starts as the norm of W's rows, so a fresh adapter does not change the output."""

    @classmethod
    def problem(cls, base: nn.Module) -> str:
        """Why DoRA cannot be added to `base`: the norm is computed from W, so W must not be quantized."""
        quantized = isinstance(base, nn.Linear | Conv1D) and not base.weight.dtype.is_floating_point
        return (
            _("DoRA needs unquantized weights. Load the base model unquantized, or train plain LoRA.")
            if quantized
            else ""
        )

    @classmethod
    def parts(cls, layer: "LoRALayer") -> dict[str, tuple[int, ...]]:
        """The magnitude vector m [O]."""
        return {MAGNITUDE: (layer.out_features,)}

    @torch.no_grad()
    def start(self) -> None:
        """Set m to the norm of W's rows (B is still zero)."""
        self.part(MAGNITUDE).copy_(self._norm(self._weight()))

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """y plus the difference to the DoRA output, so that a fresh adapter leaves y bit for bit unchanged."""
        base, m_O = self.layer.base_layer, self.part(MAGNITUDE)
        if self.drops:  # W x must see the same dropped-out input as B A x
            x_TI = self.dropout(x_TI)
        of_W: Tensor = base(x_TI) if self.drops else y_TO
        bias: Tensor | None = getattr(base, "bias", None)
        wide_TO = (of_W if bias is None else of_W - bias).to(m_O.dtype)
        scale_O = m_O / self._norm(self._weight())
        added_TO = (scale_O - 1) * wide_TO + scale_O * self.low_rank(x_TI.to(m_O.dtype))
        return y_TO + added_TO.to(y_TO.dtype)

    def merged(self, W_OI: Tensor) -> Tensor:
        """The merged weight m / ||W + s B A|| * (W_OI + s B A) [O, I]; W_OI may have other adapters in it already."""
        scale_O = self.part(MAGNITUDE).double() / self._norm(self._weight().double())
        return scale_O[:, None] * super().merged(W_OI)

    def _weight(self) -> Tensor:
        W: Tensor = self.layer.base_layer.weight  # type: ignore[assignment]
        return W.t() if isinstance(self.layer.base_layer, Conv1D) else W

    @torch.no_grad()
    def _norm(self, W_OI: Tensor) -> Tensor:
        """||W + s B A|| [O], in the wider of the adapter's dtype and W's."""
        A, B = self.matrices
        dtype = torch.promote_types(W_OI.dtype, A.dtype)
        norm_O: Tensor = torch.linalg.vector_norm(W_OI.to(dtype) + self.scaling * (B.to(dtype) @ A.to(dtype)), dim=1)
        return norm_O
