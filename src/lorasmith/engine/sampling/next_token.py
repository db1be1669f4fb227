"""Choosing the next tokens of all requests of a step from their logits.

    N = requests that get a token, V = vocabulary

A request's token depends only on its own logits, seed and settings, not on the other requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.engine.request import RunningRequest
from lorasmith.engine.sampling.logprobs import logprobs_of
from lorasmith.engine.sampling.penalty import PenalizedRow, apply_penalties
from lorasmith.engine.sampling.sample import Rules, sample
from lorasmith.errors import ModelError
from lorasmith.i18n import _


def next_tokens(logits_NV: Tensor, runs: Sequence[RunningRequest]) -> list[int]:
    """The next token of each request. Also sets `logprobs` of the requests that ask for them.

    logits_NV is float32 and is modified in place. Raises ModelError if it contains NaN.
    """
    if not runs:
        return []
    asked = [i for i, run in enumerate(runs) if run.request.sampling.logprobs is not None]
    own_NV = logits_NV[asked] if asked else None  # a copy, before they are modified
    _change(logits_NV, runs)
    best_N, tokens_N = logits_NV.max(-1)
    if best_N.isnan().any():  # max propagates NaN
        raise ModelError(
            _(
                "the model produced NaN logits. Try --dtype float32; if that does not help, the weights of the "
                "base model or the adapter are damaged."
            )
        )
    sampled = [i for i, run in enumerate(runs) if run.request.sampling.temperature > 0]
    if sampled:
        settings = [runs[i].request.sampling for i in sampled]
        rules = Rules.of(settings, [runs[i].replied for i in sampled], logits_NV.device)
        tokens_N[sampled] = sample(logits_NV if len(sampled) == len(runs) else logits_NV[sampled], rules)
    tokens = [int(token) for token in tokens_N.tolist()]
    if own_NV is not None:
        _record_logprobs(own_NV, [runs[i] for i in asked], [tokens[i] for i in asked])
    return tokens


def _change(logits_NV: Tensor, runs: Sequence[RunningRequest]) -> None:
    """Apply the penalties, the logit bias and the grammar of each request in place."""
    counts = [run.token_counts for run in runs]
    penalized = [PenalizedRow(i, c, runs[i].request.sampling) for i, c in enumerate(counts) if c is not None]
    apply_penalties(logits_NV, penalized)
    for i, run in enumerate(runs):
        if bias := run.request.sampling.logit_bias:
            ids_B = torch.tensor(list(bias), device=logits_NV.device)
            logits_NV[i, ids_B] += torch.tensor(list(bias.values()), device=logits_NV.device)
        if run.derivation is not None:
            run.derivation.restrict(logits_NV[i], run.stop_ids)


def _record_logprobs(logits_NV: Tensor, runs: Sequence[RunningRequest], tokens: Sequence[int]) -> None:
    tops = [run.request.sampling.logprobs or 0 for run in runs]
    for run, logprobs in zip(runs, logprobs_of(logits_NV, tokens, tops), strict=True):
        run.logprobs = logprobs
