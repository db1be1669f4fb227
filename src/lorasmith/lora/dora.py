"""DoRA: LoRA gives the direction of each row of the weight, a vector m its length (arXiv:2402.09353, equation 5).

    y = m / ||W + s B A|| * (W x + s B A x) + bias        one norm for each output

For the gradient the norm is a constant (section 4.3).
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
    """m starts as the norm of W's rows, so that a fresh adapter changes nothing."""

    @classmethod
    def problem(cls, base: nn.Module) -> str:
        """The norm needs W itself."""
        quantised = isinstance(base, nn.Linear | Conv1D) and not base.weight.dtype.is_floating_point
        return _("DoRA needs unquantised weights. Load the base unquantised, or train plain LoRA.") if quantised else ""

    @classmethod
    def parts(cls, layer: "LoRALayer") -> dict[str, tuple[int, ...]]:
        """m [O]."""
        return {MAGNITUDE: (layer.out_features,)}

    @torch.no_grad()
    def start(self) -> None:
        """B is zero."""
        self.part(MAGNITUDE).copy_(self._norm(self._weight()))

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """The change is added to y: so a fresh adapter leaves its every bit."""
        base, m_O = self.layer.base_layer, self.part(MAGNITUDE)
        if self.drops:  # W x has to be of the same input
            x_TI = self.dropout(x_TI)
        of_W: Tensor = base(x_TI) if self.drops else y_TO
        bias: Tensor | None = getattr(base, "bias", None)
        wide_TO = (of_W if bias is None else of_W - bias).to(m_O.dtype)
        scale_O = m_O / self._norm(self._weight())
        added_TO = (scale_O - 1) * wide_TO + scale_O * self.low_rank(x_TI.to(m_O.dtype))
        return y_TO + added_TO.to(y_TO.dtype)

    def merged(self, W_OI: Tensor) -> Tensor:
        """m / ||W + s B A|| * (W + s B A)."""
        scale_O = self.part(MAGNITUDE).double() / self._norm(W_OI)
        return scale_O[:, None] * super().merged(W_OI)

    def _weight(self) -> Tensor:
        W: Tensor = self.layer.base_layer.weight  # type: ignore[assignment]
        return W.t() if isinstance(self.layer.base_layer, Conv1D) else W

    @torch.no_grad()
    def _norm(self, W_OI: Tensor) -> Tensor:
        """||W + s B A|| [O], in the dtype of the adapter, or W's where that is wider."""
        A, B = self.matrices
        dtype = torch.promote_types(W_OI.dtype, A.dtype)
        norm_O: Tensor = torch.linalg.vector_norm(W_OI.to(dtype) + self.scaling * (B.to(dtype) @ A.to(dtype)), dim=1)
        return norm_O
