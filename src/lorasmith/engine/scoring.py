"""Logprobs of prompt tokens, for `echo` with `logprobs` in the completions API.

    N = scored tokens of a row, C = chunk, V = vocabulary

Short prompts are computed in rows without a KV cache, where a prefix that prompts of the same adapter share is computed
once. A longer prompt is computed in chunks with a KV cache of its own, so that the engine's requests go on in between.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.request import Request
from lorasmith.engine.sampling.logprobs import TokenLogprobs, logprobs_of
from lorasmith.errors import DataError
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import scoring
from lorasmith.model.forward import active_from, hidden, padded_output, row_of
from lorasmith.model.head import kept_logits, label_chunks, logits
from lorasmith.model.row import IGNORED, Example, Row, Span, slices_of
from lorasmith.model.vocabulary import refuse_surplus

BATCH_TOKENS = 512  # maximum tokens of a batch of prompts; a longer prompt is computed in chunks
CHUNK_TOKENS = 128  # tokens of a chunk, for each of which all logits are computed

Scores = list[TokenLogprobs | None]  # of the tokens of a prompt, the first of which has None
Step = Callable[[], None]


def prompt_logprobs(base: Base, requests: Sequence[Request]) -> list[Scores]:
    """The logprobs of each prompt's tokens, given the tokens before them.

    The first token of a prompt gets None. `sampling.logprobs` of a request is the number of top logprobs per token
    (None means 0); its other settings are ignored. Must be called from the thread that runs the engine, whose requests
    are not affected. Raises DataError if a prompt exceeds the context length.
    """
    scoring = PromptScoring(base, requests)
    while scoring.step():
        pass
    return scoring.scores


class PromptScoring:
    """Computes `prompt_logprobs` in steps, between which the engine may run. Raises DataError as that does.

    scores: the logprobs of each prompt's tokens, complete once `step` has returned False.
    """

    def __init__(self, base: Base, requests: Sequence[Request]) -> None:
        for request in requests:
            if base.max_positions is not None and len(request.ids) > base.max_positions:
                text = _("the prompt has {tokens} tokens, but the model's context length is {limit} tokens. Shorten "
                        "the prompt.",
                         tokens=len(request.ids), limit=base.max_positions)  # fmt: skip
                raise DataError(text)
            refuse_surplus(base, request.ids)
        self.base, self._requests = base, requests
        self.scores: list[Scores] = [[None] * min(1, len(request.ids)) for request in requests]
        self._steps = self._plan()

    @torch.no_grad()
    def step(self) -> bool:
        """Compute a batch of prompts, or a chunk of one; False if all have been computed.

        Must be called from the thread that runs the engine.
        """
        planned = next(self._steps, None)
        if planned is None:
            return False
        adapter, compute = planned
        self.base.model.eval()
        try:
            with scoring(self.base, adapter):
                compute()
        finally:
            self.base.router.route(None)
        return True

    def _plan(self) -> Iterator[tuple[str | None, Step]]:
        """The adapter and the computation of each step."""
        for at in _batches(self._requests):
            requests, scores = [self._requests[i] for i in at], [self.scores[i] for i in at]
            adapter = requests[0].adapter
            if len(requests) > 1 or len(requests[0].ids) <= BATCH_TOKENS or not _has_cache(self.base):
                yield adapter, partial(_score, self.base, requests, scores)
                continue
            cache = KVCache()
            for start in range(0, len(requests[0].ids) - 1, CHUNK_TOKENS):
                yield adapter, partial(_score_chunk, self.base, requests[0], scores[0], start, cache)


def _has_cache(base: Base) -> bool:
    """Whether the model can compute packed rows with a KV cache; known once there is an engine."""
    return base.layout == "packed" and base.fast_decoder is not None and base.fast_decoder.problem is None


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


def _score(base: Base, requests: Sequence[Request], scores: Sequence[Scores]) -> None:
    """Append the logprobs of each request's prompt to its list in `scores`; all requests use the same adapter."""
    examples = [Example(list(one.ids), [*one.ids[1:], IGNORED], [1.0] * len(one.ids), "prompt") for one in requests]
    adapter = requests[0].adapter
    lists = [own for own, one in zip(scores, requests, strict=True) for _token in one.ids[1:]]
    tops = [one.sampling.logprobs or 0 for one in requests for _token in one.ids[1:]]
    _append(base, row_of(base, examples, 1.0, adapter), lists, tops)


def _score_chunk(base: Base, request: Request, scores: Scores, start: int, cache: KVCache) -> None:
    """Append the logprobs that follow from the prompt's tokens from `start` on; `cache` has those before."""
    ids = request.ids[start : start + CHUNK_TOKENS]
    targets = request.ids[start + 1 : start + 1 + CHUNK_TOKENS]  # one less than `ids` in the last chunk
    example = Example(list(request.ids), [IGNORED] * len(request.ids), [0.0] * len(request.ids), "prompt")
    first = (active_from(base, [example], request.adapter) or [0])[0]
    adapters = [request.adapter if start + i >= first else None for i in range(len(ids))]
    row = Row(
        ids_T=torch.tensor(ids),
        position_T=torch.arange(start, start + len(ids)),
        spans=(Span(0, len(ids), start, 0),),
        counts=(len(targets),),
        at_N=torch.arange(len(targets)),
        target_N=torch.tensor(targets),
        weight_N=torch.ones(len(targets)),
        slots=tuple(slices_of(adapters)),
        label_slots=tuple(slices_of(adapters[: len(targets)])),
    )
    tops = [request.sampling.logprobs or 0] * len(targets)
    _append(base, row.to(base.device), [scores] * len(targets), tops, cache)


def _append(base: Base, row: Row, lists: Sequence[Scores], tops: Sequence[int], cache: KVCache | None = None) -> None:
    """Append the logprobs of the row's targets, with so many top logprobs, each to its list."""
    targets, first = row.target_N.tolist(), 0
    for logits_CV in _logits(base, row, cache):
        last = first + len(logits_CV)
        logprobs = logprobs_of(logits_CV, targets[first:last], tops[first:last])
        for own, of_token in zip(lists[first:last], logprobs, strict=True):
            own.append(of_token)
        first = last


def _logits(base: Base, row: Row, cache: KVCache | None) -> Iterator[Tensor]:
    """Logits [C, V] at the row's targets, in order. Uses the full model if its head is more than a linear layer."""
    if not base.head.direct:
        yield _logits_of_model(base, row, cache)
        return
    states_NH = hidden(base, row, cache).index_select(0, row.at_N)
    for start, end in label_chunks(row, base):
        yield logits(base, states_NH[start:end])


def _logits_of_model(base: Base, row: Row, cache: KVCache | None) -> Tensor:
    if base.layout == "packed":
        base.router.route(row.slots)
        return kept_logits(base, row, cache)
    return padded_output(base, row, base.model, "logits", row.at_N)
