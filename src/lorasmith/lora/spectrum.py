"""The singular values of an adapter's updates, which tell how much of the rank is in use.

    dW_OI = s B_OR A_RI        with QR of B and of A^T:  dW = s Q_B (R_B R_A^T) Q_A^T

Q_B and Q_A have orthonormal columns, so the singular values of dW are those of the small matrix s R_B R_A^T. The
product B A, which is as large as the layer, is never computed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import PEFT_PREFIX
from lorasmith.lora.ranks import rank_and_alpha

_A = re.compile(r"(.+)\.lora_(?:A\.weight|embedding_A)")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)")
MOST_OF = 0.9  # the share of the squared update that `LayerSpectrum.directions` asks for


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's update, or of the updates of one weight of all experts.

    path: of the module; values_ES: float64, in descending order, a row for each expert (a single one for a layer);
    has_magnitude: DoRA also trains the length of each weight row, which the values do not contain. rest: the sum of the
    squares of further values, if these are only the largest ones.
    """

    path: str
    values_ES: Tensor
    has_magnitude: bool = False
    rest: float = 0.0

    @property
    def rank(self) -> int:
        """The largest rank that the update can have: r, or less in a layer that is smaller."""
        return self.values_ES.shape[1]

    @property
    def effective_rank(self) -> float:
        """The effective rank, between 1 and `rank`; of experts, the median. NaN if the update is zero or has a rest."""
        if self.rest:
            return math.nan
        return float(effective_ranks(self.values_ES).nanquantile(0.5))

    @property
    def share(self) -> float:
        """The part of the rank that is in use: effective rank / rank."""
        return self.effective_rank / self.rank

    @property
    def directions(self) -> int:
        """How many directions hold 90% of the squared update; of experts, the median. `rank` + 1 if it is more."""
        energy_ES = self.values_ES.square().cumsum(1)
        needed_E1 = MOST_OF * (energy_ES[:, -1:] + self.rest)
        return int((1 + (energy_ES < needed_E1).sum(1)).median())

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update; of experts, of all of them together."""
        return math.sqrt(float(self.values_ES.square().sum()) + self.rest)

    @property
    def layer(self) -> int | None:
        """The index of the decoder layer, if the path has one."""
        found = _LAYER.search(self.path)
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """The name of the module within its decoder layer, such as `self_attn.q_proj`."""
        found = _LAYER.search(self.path)
        return found[2] if found else self.path


@dataclass(frozen=True)
class _Pair:
    """The A and B of one module by their keys, with its rank r and its scaling."""

    path: str
    A_key: str
    B_key: str
    r: int
    scaling: float
    is_parameter: bool

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A [E, R, I] and B [E, O, R], of each expert as `ParameterUpdate` stores them; E is 1 for a layer."""
        A, B = tensors[self.A_key].detach().double(), tensors[self.B_key].detach().double()
        experts = max(len(A) // self.r, 1) if self.is_parameter else 1
        return A.reshape(experts, -1, A.shape[1]), B.reshape(len(B), -1, experts).permute(2, 0, 1)


def _pairs(tensors: Mapping[str, Tensor], config: LoraConfig) -> Iterator[_Pair]:
    """The updates in an adapter's tensors by PEFT's keys, in the order of the layers."""
    for key in sorted((key for key in tensors if _A.fullmatch(key)), key=_natural):
        place = key[: key.rindex(".lora_")]
        path = place.removeprefix(PEFT_PREFIX)
        other = key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        stem = path.replace(".base_layer", "")  # PEFT wraps a module once for each of its parameters
        named = [name for name in config.target_parameters or () if f".{stem}".endswith(f".{name.rpartition('.')[0]}")]
        r, alpha = rank_and_alpha(config, f"{stem}.{named[0].rpartition('.')[2]}" if named else path)
        r = r if named else len(tensors[key])  # which tells the rank of a layer, whatever rank_pattern says
        yield _Pair(path, key, other, r, config.scaling(r, alpha), bool(named))


def spectra(tensors: Mapping[str, Tensor], config: LoraConfig) -> Iterator[LayerSpectrum]:
    """The spectrum of each update of an adapter, given its tensors by PEFT's keys, in the order of the layers."""
    for pair in _pairs(tensors, config):
        has_magnitude = any(key.startswith(f"{PEFT_PREFIX}{pair.path}.lora_magnitude") for key in tensors)
        yield LayerSpectrum(pair.path, pair.scaling * singular_values(*pair.factors(tensors)), has_magnitude)


@contextmanager
@torch.no_grad()
def strongest_half(parameters: Mapping[str, Tensor], config: LoraConfig) -> Iterator[bool]:
    """A context in which each update is its best approximation of half its rank (Eckart and Young 1936).

    parameters: A and B of a loaded adapter by PEFT's keys, which change in place and get their values back. An update
    of rank 1 is unchanged; yields whether any has a higher rank.
    """
    pairs = list(_pairs(parameters, config))
    saved = {key: parameters[key].clone() for pair in pairs for key in (pair.A_key, pair.B_key)}
    try:
        for pair in pairs:
            A_ERI, B_EOR = reduced(*pair.factors(parameters))
            parameters[pair.A_key].copy_(A_ERI.reshape(parameters[pair.A_key].shape))
            parameters[pair.B_key].copy_(B_EOR.permute(1, 2, 0).reshape(parameters[pair.B_key].shape))
        yield any(pair.r > 1 for pair in pairs)
    finally:
        for key, values in saved.items():
            parameters[key].copy_(values)


def reduced(A_ERI: Tensor, B_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in the same shapes whose product has only the largest half of the singular values of B A."""
    Q_A, R_A = torch.linalg.qr(A_ERI.mT)
    Q_B, R_B = torch.linalg.qr(B_EOR)
    U, values_ES, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    rank = values_ES.shape[1]
    keep = max(rank // 2, 1)
    root_E1K = values_ES[:, :keep].sqrt()[:, None]
    A, B = torch.zeros_like(A_ERI), torch.zeros_like(B_EOR)
    A[:, :keep] = ((Q_A @ Vh.mT)[..., :keep] * root_E1K).mT
    B[..., :keep] = (Q_B @ U)[..., :keep] * root_E1K
    return A, B


def singular_values(A_ERI: Tensor, B_EOR: Tensor) -> Tensor:
    """The singular values of each B A in descending order: [E, min(O, R, I)]."""
    R_A = torch.linalg.qr(A_ERI.mT, mode="r").R
    R_B = torch.linalg.qr(B_EOR, mode="r").R
    values_ES: Tensor = torch.linalg.svdvals(R_B @ R_A.mT)
    return values_ES


def effective_ranks(values_ES: Tensor) -> Tensor:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007): float64 [E].

    1 if one of the values dominates, S if all are equal; NaN where all are zero.
    """
    p_ES = values_ES / values_ES.sum(1, keepdim=True)
    ranks_E: Tensor = torch.special.entr(p_ES).sum(1).exp()
    return ranks_E


def _natural(key: str) -> list[tuple[float, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (math.inf, part) for part in key.split(".")]
