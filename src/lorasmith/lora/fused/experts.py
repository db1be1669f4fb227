"""The experts of a layer with LoRA on their weights, without computing W + s B A.

    h_SO = x_SI W_OI^T + s (x_SI A_RI^T) B_OR^T        for the tokens of one expert, and the same for its output

    T = tokens, K = experts of each, S = T*K of these pairs, E = experts, H = hidden size

The plain path (`LoRAParameters`) needs the gradient of the whole W + s B A, which is as expensive as full fine-tuning,
and rounds the sum to the dtype of W. The reference implementation is `LoRAParameters.unfused`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_UP, _UP_GATED, _DOWN = "up_proj", "gate_up_proj", "down_proj"


class _Update(Protocol):
    """A `ParameterUpdate`."""

    scaling: float

    @property
    def factors(self) -> tuple[Tensor, Tensor]: ...


def can_fuse(experts: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `fused_experts` computes what this module does, with updates of the parameters `names`.

    It does for classes that transformers' `use_experts_implementation` marks, which replaces their forward too.
    """
    if kwargs or len(args) != 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in args):
        return False
    marks = all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"))
    if not marks or getattr(experts, "_is_expert_parallel", True) or torch.compiler.is_compiling():
        return False
    return set(names) <= {_UP_GATED if experts.has_gate else _UP, _DOWN}


def fused_experts(
    experts: Any, updates: Mapping[str, _Update], x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """The experts' output [T, H] in x's dtype.

    index_TK: the experts of each token; an index of E or more stands for none. weight_TK: their weights.
    """
    K, up = index_TK.shape[1], _UP_GATED if experts.has_gate else _UP
    E = getattr(experts, up).shape[0]
    expert_S, pair_S = index_TK.reshape(-1).sort(stable=True)
    sizes = torch.bincount(expert_S.clamp(max=E), minlength=E + 1).tolist()[:E]
    first, second = (_Projection(experts, name, updates.get(name), x_TH.dtype) for name in (up, _DOWN))
    pair_S = pair_S[: sum(sizes)]
    # gathered and split at once: each selection by itself would have a gradient of the size of the whole
    outputs = []
    for e, x_SH in enumerate(x_TH[pair_S // K].split(sizes)):
        if len(x_SH):
            h = first(x_SH, e)
            y = second(experts._apply_gate(h) if experts.has_gate else experts.act_fn(h), e)
            outputs.append(experts.post_expert_norm(y) if experts.has_post_expert_norm else y)
    y_SH = (torch.cat(outputs) if outputs else x_TH[:0]) * weight_TK.reshape(-1)[pair_S, None]
    whole_SH = y_SH.new_zeros(index_TK.numel(), x_TH.shape[1]).index_copy(0, pair_S, y_SH)
    return whole_SH.view(*index_TK.shape, x_TH.shape[1]).sum(1).to(x_TH.dtype)


class _Projection:
    """One projection of all experts, with its update if there is one."""

    def __init__(self, experts: Any, name: str, update: _Update | None, dtype: torch.dtype) -> None:
        self.W, self.transposed = getattr(experts, name), experts.is_transposed
        self.bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        self.factors = None if update is None else [factor.to(dtype).unbind() for factor in update.factors]
        self.scaling = 1.0 if update is None else update.scaling

    def __call__(self, x_SI: Tensor, e: int) -> Tensor:
        W_OI = self.W[e].t() if self.transposed else self.W[e]
        y_SO = F.linear(x_SI, W_OI, None if self.bias is None else self.bias[e])
        if self.factors is None:
            return y_SO
        A, B = self.factors
        return torch.addmm(y_SO, F.linear(x_SI, A[e]), B[e].t(), alpha=self.scaling)
