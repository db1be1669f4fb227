"""LoRA with a bias in B (PEFT's lora_bias), for adapters that were extracted from a model with changed biases.

y += s (B A x + b)
"""

import torch
from torch import Tensor, nn

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.update import Update

BIAS = "lora_B.bias"  # PEFT's name


class LoraBias(Update):
    """The update s (B A x + b). b [O] starts at zero."""

    B_HAS_BIAS = True

    @property
    def bias(self) -> nn.Parameter:
        """b [O]."""
        b: nn.Parameter = self.layer.lora_B[self.adapter].bias  # type: ignore[assignment]
        return b

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """A, B and b."""
        return super().parameters | {BIAS: self.bias}

    @torch.no_grad()
    def start(self) -> None:
        """Set b to zero."""
        self.bias.zero_()

    @property
    def has_moved(self) -> bool:
        """Whether B A or b is nonzero."""
        return super().has_moved or bool(self.bias.any())

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """y + s (B A x + b)."""
        return super().forward(x_TI, y_TO) + (self.scaling * self.bias).to(y_TO.dtype)

    def merged_bias(self, bias_O: Tensor | None) -> Tensor | None:
        """bias + s b. Raises AdapterError if the layer has no bias that could take up b."""
        if bias_O is None:
            raise AdapterError(
                _(
                    "the adapter has biases of its own (lora_bias), and the layers that it changes have none, so it "
                    "cannot be merged. Serve it unmerged."
                )
            )
        return bias_O + self.scaling * self.bias.double()
