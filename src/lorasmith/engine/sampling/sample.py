"""Sampling with temperature, top_k, top_p and min_p.

    D = rows that are sampled, V = vocabulary, K = candidates, the most likely tokens that are considered

Uses the exponential race: with E exponentially distributed, the token with the largest p / E is distributed as p
(equivalent to the Gumbel-max trick), and rounding of p rarely changes the winner. E is a hash of the seed, the position
in the reply and the token id, so sampling has no state and does not depend on other requests. The filters and their
order are those of transformers' logits processors.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lorasmith.config.sampling import SamplingConfig

FIRST_CANDIDATES = 128  # nearly always enough for top_p; finding the top 128 takes 0.1 ms, sorting a row 15 ms
MAX_TOP_K = 2**31  # more than any vocabulary, and still an int64
WIDENING = 16  # factor by which the number of candidates grows if they are too few
_GOLDEN, _A, _B = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Rules(NamedTuple):
    """The sampling settings of all rows, each [D, 1]. `key_D1` combines the seed and the position in the reply."""

    temperature_D1: Tensor
    top_p_D1: Tensor
    min_p_D1: Tensor
    top_k_D1: Tensor
    key_D1: Tensor

    @classmethod
    def of(cls, settings: Sequence[SamplingConfig], places: Sequence[int], device: torch.device) -> Self:
        """From the settings of each row. `places`: the number of tokens in each reply so far."""
        real = torch.tensor([[s.temperature, s.top_p, s.min_p] for s in settings], dtype=torch.float32).to(device)
        top_k = [min(s.top_k, MAX_TOP_K) for s in settings]
        whole = torch.tensor([[k, s.seed, n] for k, s, n in zip(top_k, settings, places, strict=True)]).to(device)
        temperature_D1, top_p_D1, min_p_D1 = real.split(1, 1)
        top_k_D1, seed_D1, place_D1 = whole.split(1, 1)
        key_D1 = _mix(_mix(seed_D1 + _GOLDEN) + place_D1 * _GOLDEN)
        return cls(temperature_D1.clamp(1e-30, 1e30), top_p_D1, min_p_D1, top_k_D1, key_D1)

    def rows(self, at_R: Sequence[int]) -> Self:
        """The rules of the rows `at_R`."""
        return type(self)(*(rule_D1[list(at_R)] for rule_D1 in self))


def sample(logits_DV: Tensor, rules: Rules) -> Tensor:
    """Sample a token id for each row: [D], int64. A token with logit -inf is never sampled."""
    above_DV = (logits_DV - logits_DV.amax(-1, keepdim=True)).div_(rules.temperature_D1)
    return _race(torch.softmax(above_DV, -1, out=above_DV), rules, FIRST_CANDIDATES)


def filter_probabilities(best_DK: Tensor, rules: Rules) -> Tensor:
    """Set to 0 what top_k, top_p and min_p drop from probabilities [D, K] in descending order. Ties are kept."""
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
    """Sample among the `look` most likely tokens; retry with more candidates for rows that may need them.

    For rows without any filter, all other tokens take part in the race as one, and one of them is sampled if it wins.
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
        score_R, winner_R = (rest_RV / _exponential(rules.key_D1[rest_R], ids_1V)).max(-1)
        tokens_D[rest_R] = torch.where(score_R > 0, winner_R, tokens_D[rest_R])
    return tokens_D


def _exponential(key_D1: Tensor, ids_DK: Tensor) -> Tensor:
    """An exponential variate for each token id, float64 if the device supports it."""
    bits_DK = _shift(_mix(key_D1 + ids_DK * _GOLDEN), 11)
    wide = torch.float32 if key_D1.device.type == "mps" else torch.float64
    uniform_DK = (bits_DK.to(wide) + 0.5) * 2.0**-53
    return -torch.log1p(-uniform_DK.clamp(max=1 - 2**-24))


def _mix(x: Tensor) -> Tensor:
    """The mixing function of splitmix64 (Steele, Lea and Flood 2014); relies on int64 wrapping around."""
    x = (x ^ _shift(x, 30)) * _A
    x = (x ^ _shift(x, 27)) * _B
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift right; torch's `>>` is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _true_rows(where_D1: Tensor) -> list[int]:
    return [int(i) for i in where_D1[:, 0].nonzero()[:, 0].tolist()]
