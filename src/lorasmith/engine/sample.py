"""How the next tokens are chosen from their logits.

    N = requests that get a token, V = vocabulary

Every rule works on the request's own row, and its noise comes from its own generator, so that what is drawn does not
depend on what else is decoded. Definitions as in transformers' processors of the same names, in its order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.engine.request import Running
from lorasmith.errors import ModelError
from lorasmith.i18n import _

FIRST_LOOK = 1024  # likeliest tokens that nearly always hold top_p; sorting all 49,152 takes 15 ms a row


def sample(logits_NV: Tensor, runs: Sequence[Running]) -> list[int]:
    """The next token of each request. logits_NV float32, changed in place by penalties. Raises ModelError at a NaN."""
    if not runs:
        return []
    for logits_V, run in zip(logits_NV, runs, strict=True):
        if run.request.sampling.repetition_penalty != 1:
            penalise(logits_V, run.ids, run.request.sampling.repetition_penalty)
    best_N, tokens_N = logits_NV.max(-1)
    if best_N.isnan().any():  # a NaN anywhere in a row is its largest
        raise ModelError(
            _("its logits are no numbers (NaN). Try --dtype float32; else weights of base or adapter are broken.")
        )
    drawn = [i for i, run in enumerate(runs) if run.request.sampling.temperature > 0]
    if drawn:
        at_D = torch.tensor(drawn, device=logits_NV.device)
        tokens_N[at_D] = _draw(logits_NV.index_select(0, at_D), [runs[i] for i in drawn])
    return [int(token) for token in tokens_N.tolist()]


def penalise(logits_V: Tensor, ids: Sequence[int], penalty: float) -> None:
    """Divide positive and multiply negative logits of tokens that were there (CTRL, arXiv:1909.05858, section 4.1)."""
    ids_I = torch.tensor(ids, device=logits_V.device).unique()
    seen_I = logits_V[ids_I]
    logits_V[ids_I] = torch.where(seen_I < 0, seen_I * penalty, seen_I / penalty)


def keep_top_k(logits_NV: Tensor, top_k: Sequence[int]) -> Tensor:
    """-inf for all but the top_k[n] likeliest tokens of each row, and those as likely as the last of them; 0: all."""
    words = logits_NV.shape[1]
    sizes = [k if 0 < k < words else 0 for k in top_k]
    if not any(sizes):
        return logits_NV
    best_NK = logits_NV.topk(max(sizes)).values
    at_N1 = torch.tensor([[max(k - 1, 0)] for k in sizes], device=logits_NV.device)
    last_N1 = best_NK.gather(1, at_N1)
    last_N1[torch.tensor([k == 0 for k in sizes], device=logits_NV.device)] = -torch.inf
    return logits_NV.masked_fill(logits_NV < last_N1, -torch.inf)


def keep_top_p(logits_NV: Tensor, top_p: Sequence[float]) -> Tensor:
    """-inf for all but the likeliest tokens that together reach top_p[n] of the probability, and their equals."""
    if all(p >= 1 for p in top_p):
        return logits_NV
    words = logits_NV.shape[1]
    probability_NV = logits_NV.softmax(-1)
    p_N1 = torch.tensor([[p] for p in top_p], dtype=probability_NV.dtype, device=logits_NV.device)
    best_NK = probability_NV.topk(min(FIRST_LOOK, words)).values
    if best_NK.shape[1] < words and bool((best_NK.sum(-1, keepdim=True) < p_N1)[p_N1 < 1].any()):
        best_NK = probability_NV.sort(descending=True).values
    before_NK = best_NK.cumsum(-1) - best_NK
    last_N1 = (before_NK < p_N1).sum(-1, keepdim=True) - 1
    least_N1 = best_NK.gather(1, last_N1.clamp(min=0))
    least_N1[p_N1 >= 1] = 0
    return logits_NV.masked_fill(probability_NV < least_N1, -torch.inf)


def _draw(logits_NV: Tensor, runs: Sequence[Running]) -> Tensor:
    """A race of exponentials: argmax p / -log u has the distribution p, and rounding of p rarely changes who wins."""
    settings = [run.request.sampling for run in runs]
    temperature_N1 = torch.tensor([[s.temperature] for s in settings], device=logits_NV.device)
    logits_NV = keep_top_k(logits_NV / temperature_N1, [s.top_k for s in settings])
    probability_NV = keep_top_p(logits_NV, [s.top_p for s in settings]).softmax(-1)
    noise_NV = torch.stack([torch.rand(logits_NV.shape[1], generator=run.generator) for run in runs])
    return (probability_NV / -noise_NV.to(logits_NV.device).log()).argmax(-1)
