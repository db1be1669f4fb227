"""What one adapter adds to one linear layer: the only object that says so.

    y_TO += s B A x_TI        (LoRA, arXiv:2106.09685, section 4.1)

    T = tokens, I = in_features, O = out_features, R = rank

Whatever computes for several layers or adapters at once (fused linears and MLPs, the adapter bank, the decoder stack)
asks `is_low_rank` first. An update that is more than plain low rank runs by its own `forward`, in its own layer.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorasmith.lora.layer import LoRALayer


class Update:
    """Plain low rank, and what a variant overrides: `forward` and `merged`, with `parts` and `start` where it has more
    parameters than A and B. See variant.py for the table of variants.
    """

    def __init__(self, layer: "LoRALayer", adapter: str, scaling: float) -> None:
        self.layer, self.adapter, self.scaling = layer, adapter, scaling

    @property
    def is_low_rank(self) -> bool:
        """Whether it adds s B A x and nothing else. No subclass is taken for it, whatever it leaves as it is."""
        return type(self) is Update

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [R, I] and B [O, R]."""
        A, B = (s.get_parameter(f"{self.adapter}.weight") for s in (self.layer.lora_A, self.layer.lora_B))
        return A, B

    @property
    def dropout(self) -> nn.Module:
        """What the input of A goes through."""
        return self.layer.lora_dropout[self.adapter]

    @property
    def drops(self) -> bool:
        """Whether dropout changes the input of A now."""
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training

    def part(self, name: str) -> nn.Parameter:
        """One of its `parts`."""
        parameter: nn.Parameter = getattr(self.layer, name)[self.adapter]
        return parameter

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that it trains, under the names of PEFT's files, behind the path of the layer."""
        A, B = self.matrices
        return {"lora_A.weight": A, "lora_B.weight": B, **{name: self.part(name) for name in self.parts(self.layer)}}

    def low_rank(self, x_TI: Tensor) -> Tensor:
        """s B A x [T, O] in x's dtype, by autograd's own formula."""
        A, B = self.matrices
        return self.scaling * F.linear(F.linear(x_TI, A.to(x_TI.dtype)), B.to(x_TI.dtype))

    @classmethod
    def problem(cls, base: nn.Module) -> str:
        """Why it cannot go on a layer with this base; empty where it can."""
        return ""

    @classmethod
    def parts(cls, layer: "LoRALayer") -> dict[str, tuple[int, ...]]:
        """Its parameters beside A and B: names as in PEFT's files, which begin with lora_, and shapes."""
        return {}

    def start(self) -> None:
        """Fill `parts`, once A and B have their first values; the layer must then give what its base gives."""

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """The layer's output [T, O] for these tokens; y = W x is the base's, and is not written to."""
        return y_TO + self.low_rank(self.dropout(x_TI)).to(y_TO.dtype)

    def merged(self, W_OI: Tensor) -> Tensor:
        """The one weight that gives what base and update give together. W in float64."""
        A, B = self.matrices
        return W_OI + B.double() @ A.double() * self.scaling
