"""Samples a token of each row by its probabilities and its request's rules.

    D = rows that are sampled, V = vocabulary, K = candidates: the likeliest tokens that are looked at

A race of exponentials: the token with the greatest p / E wins, which has the distribution p, and rounding of p rarely
changes who wins. E is a hash of seed, place in the reply and token id: it needs no state, and what a request gets
depends on nothing else that is decoded. Rules as in transformers' processors of the same names, in its order.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lorasmith.config.sampling import SamplingConfig

FIRST_CANDIDATES = 128  # candidates that nearly always hold top_p; a row's likeliest 128 take 0.1 ms, sorting it 15 ms
MAX_TOP_K = 2**31  # words of any vocabulary: a top_k beyond it says nothing, and one beyond 2**63 is no int64
WIDENING = 16  # how many times more candidates each further look has
_GOLDEN, _A, _B = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Rules(NamedTuple):
    """What the rows' requests ask for, each [D, 1]; `key_D1` decides what is sampled."""

    temperature_D1: Tensor
    top_p_D1: Tensor
    min_p_D1: Tensor
    top_k_D1: Tensor
    key_D1: Tensor

    @classmethod
    def of(cls, settings: Sequence[SamplingConfig], places: Sequence[int], device: torch.device) -> Self:
        """`places`: how many tokens each reply has already."""
        real = torch.tensor([[s.temperature, s.top_p, s.min_p] for s in settings], dtype=torch.float32).to(device)
        top_k = [min(s.top_k, MAX_TOP_K) for s in settings]
        whole = torch.tensor([[k, s.seed, n] for k, s, n in zip(top_k, settings, places, strict=True)]).to(device)
        temperature_D1, top_p_D1, min_p_D1 = real.split(1, 1)
        top_k_D1, seed_D1, place_D1 = whole.split(1, 1)
        key_D1 = _mix(_mix(seed_D1 + _GOLDEN) + place_D1 * _GOLDEN)
        return cls(temperature_D1.clamp(1e-30, 1e30), top_p_D1, min_p_D1, top_k_D1, key_D1)

    def rows(self, at_R: Sequence[int]) -> Self:
        """Those of some rows."""
        return type(self)(*(rule_D1[list(at_R)] for rule_D1 in self))


def sample(logits_DV: Tensor, rules: Rules) -> Tensor:
    """A token of each row [D]. Where a logit is -inf, its token is never sampled."""
    above_DV = (logits_DV - logits_DV.amax(-1, keepdim=True)).div_(rules.temperature_D1)
    return _race(torch.softmax(above_DV, -1, out=above_DV), rules, FIRST_CANDIDATES)


def filter_probabilities(best_DK: Tensor, rules: Rules) -> Tensor:
    """Probabilities in falling order [D, K] -> 0 for those that top_k, top_p or min_p drop. Equals stay together."""
    top_k_D1, top_p_D1 = rules.top_k_D1, rules.top_p_D1
    last_D1 = best_DK.gather(1, (top_k_D1 - 1).clamp(0, best_DK.shape[1] - 1))
    is_cut_D1 = (top_k_D1 > 0) & (top_k_D1 <= best_DK.shape[1])
    kept_DK = best_DK.masked_fill(is_cut_D1 & (best_DK < last_D1), 0)
    whole_D1 = torch.where(is_cut_D1, kept_DK.sum(-1, keepdim=True), 1)
    before_DK = kept_DK.cumsum(-1) - kept_DK
    at_D1 = (before_DK < top_p_D1 * whole_D1).sum(-1, keepdim=True) - 1
    least_D1 = torch.where(top_p_D1 < 1, kept_DK.gather(1, at_D1.clamp(min=0)), 0)
    return kept_DK.masked_fill(kept_DK < torch.maximum(least_D1, rules.min_p_D1 * best_DK[:, :1]), 0)


def _race(probability_DV: Tensor, rules: Rules, look: int) -> Tensor:
    """Among `look` candidates; again with more where a rule may filter_probabilities more.

    Where no rule cuts, all other tokens run as one, which samples one of them where it wins.
    """
    words = probability_DV.shape[1]
    best_DK, ids_DK = probability_DV.topk(min(look, words))
    kept_DK = filter_probabilities(best_DK, rules)
    score_D1, place_D1 = (kept_DK / _exponential(rules.key_D1, ids_DK)).max(-1, keepdim=True)
    tokens_D = ids_DK.gather(1, place_D1)[:, 0]
    if look >= words:
        return tokens_D
    more_D1 = kept_DK[:, -1:] > 0
    is_free_D1 = (rules.top_k_D1 == 0) & (rules.top_p_D1 >= 1) & (rules.min_p_D1 == 0)
    if wider_R := _true_rows(more_D1 & ~is_free_D1):
        tokens_D[wider_R] = _race(probability_DV[wider_R], rules.rows(wider_R), look * WIDENING)
    rest_D1 = (1 - kept_DK.sum(-1, keepdim=True)).clamp(min=0)
    rest_wins_D1 = rest_D1 / _exponential(rules.key_D1, torch.full_like(place_D1, -1)) > score_D1
    if rest_R := _true_rows(more_D1 & is_free_D1 & rest_wins_D1):
        rest_RV = probability_DV[rest_R].scatter(1, ids_DK[rest_R], 0)
        ids_1V = torch.arange(words, device=rest_RV.device)[None]
        score_R, found_R = (rest_RV / _exponential(rules.key_D1[rest_R], ids_1V)).max(-1)
        tokens_D[rest_R] = torch.where(score_R > 0, found_R, tokens_D[rest_R])
    return tokens_D


def _exponential(key_D1: Tensor, ids_DK: Tensor) -> Tensor:
    """For each token an own exponential variate, float64 where the device has it."""
    bits_DK = _shift(_mix(key_D1 + ids_DK * _GOLDEN), 11)
    wide = torch.float32 if key_D1.device.type == "mps" else torch.float64
    uniform_DK = (bits_DK.to(wide) + 0.5) * 2.0**-53
    return -torch.log1p(-uniform_DK.clamp(max=1 - 2**-24))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's mixing of 64 bits (Steele, Lea and Flood 2014); int64 wraps around."""
    x = (x ^ _shift(x, 30)) * _A
    x = (x ^ _shift(x, 27)) * _B
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in: torch's own copies the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _true_rows(where_D1: Tensor) -> list[int]:
    return [int(i) for i in where_D1[:, 0].nonzero()[:, 0].tolist()]
