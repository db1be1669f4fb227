"""Starts of A and B that are computed from the base weight W, and the update of those that do not start at zero.

    PiSSA (arXiv:2404.02948)   s B0 A0 = the r largest singular values of W and their vectors
    OLoRA (arXiv:2406.01775)   B0 A0 = the first r columns of Q times the first r rows of R, where W = Q R
    MiCA (arXiv:2604.01694)    B = the left singular vectors of the r smallest singular values of W, frozen; A = 0

    I = in_features, O = out_features, R = rank

PiSSA and OLoRA take s B0 A0 out of W, so that the output stays the same. Here W is left alone, since other adapters
share it, and the update is s (B A - B0 A0), which has the same output and the same gradients. It is plain low rank of
rank 2 R, and it is saved as such: an adapter for the unchanged base model, as PEFT's
`path_initial_model_for_weight_conversion` makes it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.lora import LoraConfig
from lorasmith.i18n import _
from lorasmith.lora.update import Update

NITER = re.compile(r"pissa_niter_(\d+)")
OF_WEIGHT = ("pissa", "olora", "mica")  # beginnings of the values of init_lora_weights that are computed from W
MOVING = ("pissa", "olora")  # those that PEFT takes out of W


class FromStart(Update):
    """y += s (B A - B0 A0) x for a start A0, B0 that is not zero. `matrices` are [A; A0] and [B, -B0], of rank 2 R."""

    IS_LOW_RANK = True
    start_A_RI: Tensor
    start_B_OR: Tensor

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """[A; A0] [2 R, I] and [B, -B0] [O, 2 R]; only A and B get gradients."""
        A, B = self.own_matrices
        return torch.cat([A, self.start_A_RI]), torch.cat([B, -self.start_B_OR], dim=1)

    @torch.no_grad()
    def start(self) -> None:
        """Keep the first values of A and B."""
        A, B = self.own_matrices
        self.start_A_RI, self.start_B_OR = A.detach().clone(), B.detach().clone()

    @property
    def saved(self) -> dict[str, Tensor]:
        """The update as plain LoRA of rank 2 R."""
        A, B = self.matrices
        return {"lora_A.weight": A.detach(), "lora_B.weight": B.detach()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take A, B and their start from tensors that `saved` made."""
        A, B = self.own_matrices
        (A_, A0), (B_, B0) = saved["lora_A.weight"].chunk(2), saved["lora_B.weight"].chunk(2, dim=1)
        A.copy_(A_)
        B.copy_(B_)
        self.start_A_RI, self.start_B_OR = A0.to(A), -B0.to(B)

    @property
    def has_moved(self) -> bool:
        """Whether A or B differs from the start."""
        A, B = self.own_matrices
        return not (torch.equal(A, self.start_A_RI) and torch.equal(B, self.start_B_OR))

    @classmethod
    def saved_config(cls, config: LoraConfig) -> LoraConfig:
        """The options of the adapter that `saved` is a part of: twice the ranks, and the same scaling."""
        factor = 2**0.5 if config.use_rslora else 2
        return config.model_copy(
            update={
                "r": 2 * config.r,
                "lora_alpha": factor * config.lora_alpha,
                "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
                "alpha_pattern": {key: factor * alpha for key, alpha in config.alpha_pattern.items()},
                "init_lora_weights": "default",
            }
        )


def computed_from_weight(config: LoraConfig) -> bool:
    """Whether the start that `config` selects is computed from W."""
    return config.init_lora_weights.startswith(OF_WEIGHT)


def start_problem(base: nn.Module) -> str:
    """Why no start can be computed from the weight of `base`; empty if one can."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    if weight.dtype.is_floating_point:
        return ""
    return _("its start is computed from the weights, which are quantized. Load the base model unquantized.")


def start_of_weight(
    base: nn.Module, r: int, scaling: float, config: LoraConfig, seed: int | None
) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of a linear layer for the start that `config` selects, computed as PEFT does.

    In float32, or in float64 for a float64 base. seed: for the approximate decomposition of pissa_niter; None
    draws from torch's global generator, as PEFT does.
    """
    weight: Tensor = base.weight  # type: ignore[assignment]
    W_OI = weight.detach().t() if isinstance(base, Conv1D) else weight.detach()
    return _starts(W_OI.to(torch.promote_types(W_OI.dtype, torch.float32)), r, scaling, config.init_lora_weights, seed)


def start_of_embedding(embedding: nn.Embedding, r: int) -> tuple[Tensor, Tensor]:
    """A [R, V] and B [H, R] of MiCA for an embedding [V, H]."""
    W_HV = embedding.weight.detach().t()
    return _starts(W_HV.to(torch.promote_types(W_HV.dtype, torch.float32)), r, 1.0, "mica", 0)


def start_of_error(error_OI: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [K, I] and B [O, K] whose s B A is the best approximation of rank r. K is less than r if the rank is."""
    A, B = _starts(error_OI, r, scaling, "pissa", 0)
    nonzero = B.any(dim=0)
    return A[nonzero], B[:, nonzero]


def _starts(W_OI: Tensor, r: int, scaling: float, kind: str, seed: int | None) -> tuple[Tensor, Tensor]:
    if kind == "olora":
        Q, R = torch.linalg.qr(W_OI)
        return R[:r], Q[:, :r]
    if kind == "mica":
        U, _S, _Vh = torch.linalg.svd(W_OI, full_matrices=False)
        return W_OI.new_zeros(r, W_OI.shape[1]), U[:, -r:]
    if found := NITER.fullmatch(kind):
        devices = [W_OI.device] if W_OI.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W_OI, r, niter=int(found[1]))
        root_R = (S / scaling).sqrt()
        return root_R[:, None] * V.t(), U * root_R
    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    root_R = (S[:r] / scaling).sqrt()
    return root_R[:, None] * Vh[:r], U[:, :r] * root_R
