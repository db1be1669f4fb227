"""Logprobs of prompt tokens, for `echo` with `logprobs` in the completions API.

    N = scored tokens of a row, C = chunk, V = vocabulary

Computed in rows without a KV cache. A prefix that prompts of the same adapter share is computed once.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lorasmith.engine.request import Request
from lorasmith.engine.sampling.logprobs import TokenLogprobs, logprobs_of
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import scoring
from lorasmith.model.forward import hidden, padded_output, row_of
from lorasmith.model.head import kept_logits, label_chunks, logits
from lorasmith.model.row import IGNORED, Example, Row
from lorasmith.model.vocabulary import refuse_surplus

BATCH_TOKENS = 1024  # maximum tokens of a batch of prompts; a longer prompt is a batch of its own


@torch.no_grad()
def prompt_logprobs(base: Base, requests: Sequence[Request]) -> list[list[TokenLogprobs | None]]:
    """The logprobs of each prompt's tokens, given the tokens before them.

    The first token of a prompt gets None. `sampling.logprobs` of a request is the number of top logprobs per token
    (None means 0); its other settings are ignored. Must be called from the thread that runs the engine, whose requests
    are not affected. Raises DataError if a prompt exceeds the context length.
    """
    for request in requests:
        if base.max_positions is not None and len(request.ids) > base.max_positions:
            text = _("the prompt has {tokens} tokens, but the model's context length is {limit} tokens. Shorten the "
                    "prompt.",
                     tokens=len(request.ids), limit=base.max_positions)  # fmt: skip
            raise DataError(text)
        refuse_surplus(base, request.ids)
    base.model.eval()
    scores: list[list[TokenLogprobs | None]] = [[None] * min(1, len(request.ids)) for request in requests]
    try:
        for at in _batches(requests):
            with scoring(base, requests[at[0]].adapter):
                _score(base, [requests[i] for i in at], [scores[i] for i in at])
    finally:
        base.router.route(None)
    return scores


def _batches(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Indices of the requests of each batch, which share an adapter. Prompts of a single token are left out."""
    order = sorted((i for i, one in enumerate(requests) if len(one.ids) > 1), key=lambda i: requests[i].adapter or "")
    for _adapter, group in groupby(order, key=lambda i: requests[i].adapter):
        own = list(group)
        for places in prompt_batches([len(requests[i].ids) for i in own]):
            yield [own[place] for place in places]


def prompt_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of prompts, by their lengths, that form a batch: at most BATCH_TOKENS tokens, or one longer prompt."""
    chosen: list[int] = []
    for place, length in enumerate(lengths):
        if chosen and sum(lengths[k] for k in chosen) + length > BATCH_TOKENS:
            yield chosen
            chosen = []
        chosen.append(place)
    if chosen:
        yield chosen


def _score(base: Base, requests: Sequence[Request], scores: Sequence[list[TokenLogprobs | None]]) -> None:
    """Append the logprobs of each request's prompt to its list in `scores`; all requests use the same adapter."""
    examples = [Example(list(one.ids), [*one.ids[1:], IGNORED], [1.0] * len(one.ids), "prompt") for one in requests]
    adapter = requests[0].adapter
    lists = [own for own, one in zip(scores, requests, strict=True) for _token in one.ids[1:]]
    tops = [one.sampling.logprobs or 0 for one in requests for _token in one.ids[1:]]
    row = row_of(base, examples, 1.0, adapter)
    targets, first = row.target_N.tolist(), 0
    for logits_CV in _logits(base, row):
        last = first + len(logits_CV)
        logprobs = logprobs_of(logits_CV, targets[first:last], tops[first:last])
        for own, of_token in zip(lists[first:last], logprobs, strict=True):
            own.append(of_token)
        first = last


def _logits(base: Base, row: Row) -> Iterator[Tensor]:
    """Logits [C, V] at the row's targets, in order. Uses the full model if its head is more than a linear layer."""
    if not base.head.direct:
        yield _logits_of_model(base, row)
        return
    states_NH = hidden(base, row).index_select(0, row.at_N)
    for start, end in label_chunks(row, base):
        yield logits(base, states_NH[start:end])


def _logits_of_model(base: Base, row: Row) -> Tensor:
    if base.layout == "packed":
        base.router.route(row.slots)
        return kept_logits(base, row)
    return padded_output(base, row, base.model, "logits", row.at_N)
