"""What the model itself thought of every token of a prompt: `echo` with `logprobs` of the completions API.

    N = scored tokens of a row, C = chunk, V = vocabulary

Exact, in rows without a cache; what prompts of one adapter begin with alike is computed once.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lorasmith.engine.request import Request
from lorasmith.engine.sampling.logprobs import TokenLogprobs, logprobs_of
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import scoring
from lorasmith.model.forward import hidden, packed_inputs, padded_inputs, padded_slices, row_of
from lorasmith.model.head import CHUNK, logits
from lorasmith.model.row import IGNORED, Example, Row

ROW = 1024  # tokens that go through the model at once; a longer prompt goes alone


@torch.no_grad()
def prompt_logprobs(base: Base, requests: Sequence[Request]) -> list[list[TokenLogprobs | None]]:
    """For each request, for each token of its prompt: its logprob after those before it, and the likeliest there.

    The first token of a prompt has None: nothing stands before it. How many of the likeliest: `sampling.logprobs` of
    the request, None counts as 0; the rest of its sampling is not looked at. A token is the model's own greedy choice
    where `top[0][0]` is it. Called from the thread that steps the engine; an engine's requests are not touched.
    Raises DataError where a prompt is longer than the model admits.
    """
    for request in requests:
        if base.max_positions is not None and len(request.ids) > base.max_positions:
            text = _("the prompt has {tokens} tokens, but the model's context length is {limit} tokens. Shorten the "
                    "prompt.",
                     tokens=len(request.ids), limit=base.max_positions)  # fmt: skip
            raise DataError(text)
    base.model.eval()
    found: list[list[TokenLogprobs | None]] = [[None] * min(1, len(request.ids)) for request in requests]
    try:
        for at in _rows(requests):
            with scoring(base, requests[at[0]].adapter):
                _score(base, [requests[i] for i in at], [found[i] for i in at])
    finally:
        base.router.route(None)
    return found


def _rows(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Places of requests that share a row: one adapter, at most ROW tokens. A prompt of one token has none to score."""
    order = sorted((i for i, one in enumerate(requests) if len(one.ids) > 1), key=lambda i: requests[i].adapter or "")
    for _adapter, group in groupby(order, key=lambda i: requests[i].adapter):
        own = list(group)
        for places in rows_of([len(requests[i].ids) for i in own]):
            yield [own[place] for place in places]


def rows_of(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of prompts of these lengths that go together: at most ROW tokens, or one that is longer."""
    chosen: list[int] = []
    for place, length in enumerate(lengths):
        if chosen and sum(lengths[k] for k in chosen) + length > ROW:
            yield chosen
            chosen = []
        chosen.append(place)
    if chosen:
        yield chosen


def _score(base: Base, requests: Sequence[Request], found: Sequence[list[TokenLogprobs | None]]) -> None:
    """Append to each list of `found` what its request's prompt gets; all requests are of one adapter."""
    examples = [Example(list(one.ids), [*one.ids[1:], IGNORED], [1.0] * len(one.ids), "prompt") for one in requests]
    adapter = requests[0].adapter
    lists = [own for own, one in zip(found, requests, strict=True) for _token in one.ids[1:]]
    tops = [one.sampling.logprobs or 0 for one in requests for _token in one.ids[1:]]
    row = row_of(base, examples, 1.0, adapter)
    targets, first = row.target_N.tolist(), 0
    for logits_CV in _logits(base, row, adapter):
        last = first + len(logits_CV)
        for own, told in zip(
            lists[first:last], logprobs_of(logits_CV, targets[first:last], tops[first:last]), strict=True
        ):
            own.append(told)
        first = last


def _logits(base: Base, row: Row, adapter: str | None) -> Iterator[Tensor]:
    """Logits [C, V] at the row's labels, in order; from the whole model where its head is more than a linear layer."""
    if not base.head.direct:
        yield _logits_of_model(base, row)
        return
    states_NH = hidden(base, row).index_select(0, row.at_N)
    for states_CH in states_NH.split(CHUNK):
        base.router.route([Slice(adapter, 0, len(states_CH))])
        yield logits(base, states_CH)


def _logits_of_model(base: Base, row: Row) -> Tensor:
    if base.layout == "packed":
        base.router.route(row.slots)
        return base.model(**packed_inputs(base, row), logits_to_keep=row.at_N).logits[0]  # type: ignore[no-any-return]
    inputs, at_T = padded_inputs(row)
    base.router.route(padded_slices(row))
    all_NV: Tensor = base.model(**inputs, use_cache=False).logits.flatten(0, 1)
    return all_NV.index_select(0, at_T.index_select(0, row.at_N))
