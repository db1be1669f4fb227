"""The update that one adapter adds to one linear layer. Variants of LoRA subclass it.

    y_TO += s B A x_TI        (LoRA, arXiv:2106.09685, section 4.1)

    T = tokens, I = in_features, O = out_features, R = rank

Optimized code paths that compute several layers or adapters at once (fused linears and MLPs, the adapter bank, the
decoder stack) support only plain low-rank updates and check `is_low_rank`. Other updates run their own `forward`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig

if TYPE_CHECKING:
    from lorasmith.lora.layer import LoRALayer


class Update:
    """A plain low-rank update: y += s B A x.

    A variant overrides `forward` and `merged`, and `parts` and `start` if it has parameters besides A and B. One that
    is plain low rank, with other `matrices`, sets IS_LOW_RANK and overrides `saved` and `restore`. Variants are
    registered in variant.py.
    """

    IS_LOW_RANK: ClassVar[bool] = True  # not inherited
    B_HAS_BIAS: ClassVar[bool] = False

    def __init__(self, layer: "LoRALayer", adapter: str, scaling: float) -> None:
        self.layer, self.adapter = layer, adapter
        layer.scaling[adapter] = scaling  # where PEFT has it, and programs change it
        self.is_alone = False  # whether it runs its own `forward` even if it is plain low rank

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        return self.layer.scaling[self.adapter]

    @property
    def is_low_rank(self) -> bool:
        """Whether the update is exactly s B A x, with A and B of `matrices`, and may be computed with others.

        False for a subclass that does not say.
        """
        return bool(type(self).__dict__.get("IS_LOW_RANK", False)) and not self.is_alone

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B as they are computed with."""
        return self.own_matrices

    @property
    def own_matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters A [R, I] and B [O, R]."""
        A: nn.Parameter = self.layer.lora_A[self.adapter].weight  # type: ignore[assignment]
        B: nn.Parameter = self.layer.lora_B[self.adapter].weight  # type: ignore[assignment]
        return A, B

    @property
    def dropout(self) -> nn.Module:
        """The dropout module applied to the input of A."""
        return self.layer.lora_dropout[self.adapter]

    @property
    def drops(self) -> bool:
        """Whether dropout is currently active."""
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training

    def part(self, name: str) -> nn.Parameter:
        """The parameter `name` of `parts`."""
        parameter: nn.Parameter = getattr(self.layer, name)[self.adapter]
        return parameter

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in PEFT's files, relative to the layer. One may be frozen."""
        A, B = self.own_matrices
        return {"lora_A.weight": A, "lora_B.weight": B, **{name: self.part(name) for name in self.parts(self.layer)}}

    @property
    def saved(self) -> dict[str, Tensor]:
        """What is written to a file, by names in PEFT's files, relative to the layer."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take all values from tensors that `saved` made."""
        for name, p in self.parameters.items():
            p.copy_(saved[name])

    @property
    def has_moved(self) -> bool:
        """Whether the update differs from that of a new adapter: here, whether A and B are nonzero."""
        return all(bool(matrix.any()) for matrix in self.own_matrices)

    @classmethod
    def saved_config(cls, config: LoraConfig) -> LoraConfig:
        """The options that are written beside `saved`."""
        return config

    def low_rank(self, x_TI: Tensor) -> Tensor:
        """s B A x [T, O] in x's dtype, differentiated by autograd."""
        A, B = self.matrices
        return self.scaling * F.linear(F.linear(x_TI, A.to(x_TI.dtype)), B.to(x_TI.dtype))

    @classmethod
    def problem(cls, base: nn.Module) -> str:
        """Why this update cannot be added to the layer `base`; empty if it can."""
        return ""

    @classmethod
    def parts(cls, layer: "LoRALayer") -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters besides A and B, by their names in PEFT's files, which start with `lora_`."""
        return {}

    def start(self) -> None:
        """Initialize `parts`, after A and B. The layer's output must then equal that of its base layer."""

    def forward(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """The layer's output [T, O] for these tokens, given the base layer's y = W x, which must not be modified."""
        return y_TO + self.low_rank(self.dropout(x_TI)).to(y_TO.dtype)

    def merged(self, W_OI: Tensor) -> Tensor:
        """The weight [O, I] that is equivalent to the base weight W (float64) with this update."""
        A, B = self.matrices
        return W_OI + B.double() @ A.double() * self.scaling

    def merged_bias(self, bias_O: Tensor | None) -> Tensor | None:
        """The bias [O] of the merged layer, given that of the base layer (float64); None if there is none."""
        return bias_O
