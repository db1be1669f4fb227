"""Logprobs of sampled tokens under the model's own distribution, before penalties, temperature and masks.

N = tokens, V = vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """The natural log probability of a token, and the most likely tokens as (token id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of `tokens[n]` and of the `tops[n]` most likely tokens in row n; float32, or float64 like the logits."""
    log_NV = logits_NV.log_softmax(-1, dtype=None if logits_NV.dtype == torch.float64 else torch.float32)
    own = log_NV.gather(1, torch.tensor(tokens, device=log_NV.device)[:, None])[:, 0].tolist()
    most = min(max(tops, default=0), log_NV.shape[1])
    best_NK = log_NV.topk(most) if most else None
    values = best_NK.values.tolist() if best_NK else [[]] * len(own)
    ids = best_NK.indices.tolist() if best_NK else [[]] * len(own)
    return [
        TokenLogprobs(logprob, tuple(zip(row[:top], row_values[:top], strict=True)))
        for logprob, row, row_values, top in zip(own, ids, values, tops, strict=True)
    ]
