"""A self-test of each model: are packed rows with a KV cache, the adapter bank and the decoder stack correct?

A model that is decoded in padded batches is tried with those, too.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.padded import Padded
from lorasmith.engine.request import Request, RunningRequest
from lorasmith.errors import ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import FastDecoder
from lorasmith.model.forward import hidden
from lorasmith.model.probe import native_attention
from lorasmith.model.rounding import TOLERANCE, differ_by_rounding
from lorasmith.model.row import Row, Span

FARTHEST = 0.1  # a larger difference of padded batches is not taken for rounding: the other ways are right, if slower
CACHED = 2  # tokens of each text that follow the others one by one, in the test of padded batches


def decoder_of(base: Base) -> FastDecoder:
    """The FastDecoder of this base model, created on first use with every optimization that passes the self-test.

    The test runs two short texts, which takes as long as six decoding steps. It is needed in addition to the probe at
    load, which tests packed rows without a KV cache.
    """
    if base.fast_decoder is None:
        decoder = base.fast_decoder = FastDecoder(base)
        try:
            _self_test(decoder)
        except BaseException:
            decoder.close()
            raise
    return base.fast_decoder


@torch.no_grad()
def _self_test(decoder: FastDecoder) -> None:
    base = decoder.base
    words = int(base.model.config.get_text_config().vocab_size)
    ids = [(7 * i + 3) % (words - 2) for i in range(12)]
    _test_packed(decoder, (ids[:5], ids[5:]))
    if decoder.problem is not None:
        _choose_padded(decoder, (ids[:5], ids))


def _choose_padded(decoder: FastDecoder, texts: Sequence[Sequence[int]]) -> None:
    """Choose how padded batches are decoded: in the fastest way that gives the same logits as each text alone."""
    base, training = decoder.base, decoder.base.model.training
    base.model.eval()
    try:
        expected = _of_texts(base, texts)
        for decoder.batches, decoder.caches in ((True, True), (False, True), (False, False)):
            try:
                actual = _decoded(decoder, texts)
            except _FAILURES:
                continue
            if differ_by_rounding(base, (actual,), (expected,), lambda: (_of_texts(base, texts),), FARTHEST):
                break
    finally:
        base.model.train(training)
        base.router.route(None)
    if not decoder.batches:
        decoder.problem = _(
            "{problem}; requests are answered one by one, because padding changes their results",
            problem=decoder.problem,
        )


def _of_texts(base: Base, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the base model after the last tokens of each text, alone: [texts * (CACHED + 1), V] in float32."""
    with native_attention(base):
        base.router.route([Slice(None, 0, 1)])  # a single slice holds for all tokens
        alone = [
            base.model(input_ids=torch.tensor([list(text)], device=base.device), use_cache=False) for text in texts
        ]
    return torch.cat([out.logits[0, -CACHED - 1 :] for out in alone]).float()


def _decoded(decoder: FastDecoder, texts: Sequence[Sequence[int]]) -> Tensor:
    """The same logits in padded batches, where the last tokens of each text follow the first ones one by one."""
    base = decoder.base
    runs = [
        RunningRequest(
            i, Request(text[:-CACHED]), list(text[:-CACHED]), len(text), frozenset(), Detokenizer(base.tokenizer)
        )
        for i, text in enumerate(texts)
    ]
    layout, waiting = padded_layout(decoder, len(runs)), deque(runs)
    logits: list[list[Tensor]] = [[] for _text in texts]
    while any(len(own) <= CACHED for own in logits):
        chunks = layout.schedule(waiting)
        for chunk, row_V in zip(chunks, layout.run(chunks), strict=True):
            run = chunk.running
            logits[run.key].append(row_V)
            if len(run.ids) < run.limit:
                run.ids.append(texts[run.key][len(run.ids)])
            else:
                layout.release(run)
    return torch.stack([row_V for own in logits for row_V in own])


def padded_layout(decoder: FastDecoder, slots: int) -> Padded:
    """Padded batches of up to `slots` requests, as the self-test of this model chose them."""
    return Padded(decoder.base, slots if decoder.batches else 1, decoder.caches)


def _test_packed(decoder: FastDecoder, texts: Sequence[Sequence[int]]) -> None:
    """Set `problem` if packed rows with a KV cache do not work; else choose what of the fast decoder works."""
    base = decoder.base
    if base.layout != "packed":
        decoder.problem = base.why.get("layout", "")
        return
    try:
        expected = hidden(base, _pieces(texts, (0, 0), (5, 7)).to(base.device))[[4, 11]]
        actual = _in_pieces(base, texts)
    except _FAILURES as error:
        decoder.problem = _("its attention does not work with a KV cache ({error})", error=first_line(error))
        return
    finally:
        base.router.route(None)
    if not _is_close(actual, expected, base):
        decoder.problem = _("processing a text in pieces gives different results from processing it at once")
        return
    if any(adapter.is_whole_model for adapter in base.adapters.values()):
        decoder.plain = _("all weights are being trained")  # so nothing may keep a copy of them
        return
    for as_stack in (True, False):
        decoder.group(as_stack)
        why = _difference_of(decoder, texts, expected)
        if not why:
            return
    decoder.ungroup()
    decoder.plain = why


def _difference_of(decoder: FastDecoder, texts: Sequence[Sequence[int]], expected: Tensor) -> str:
    """Why decoding in the bank, or with the decoder stack, gives wrong results; empty if it does not."""
    base = decoder.base
    try:
        with decoder.running():
            actual = _in_pieces(base, texts)
    except _FAILURES as error:
        return _("it fails with an error: {error}", error=first_line(error))
    finally:
        base.router.route(None)
    return "" if _is_close(actual, expected, base) else _("the optimized forward pass gives different results")


_FAILURES = (ModelError, TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError)


def _in_pieces(base: Base, texts: Sequence[Sequence[int]]) -> Tensor:
    """The last hidden states of two texts whose first tokens were put into the cache in an earlier pass."""
    cache = KVCache()
    hidden(base, _pieces(texts, (0, 0), (4, 1)).to(base.device), cache)
    return hidden(base, _pieces(texts, (4, 1), (5, 7)).to(base.device), cache)[[0, 6]]


def _is_close(actual: Tensor, expected: Tensor, base: Base) -> bool:
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return difference <= TOLERANCE[base.dtype]


def _pieces(texts: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int]) -> Row:
    """A row of tokens [start, end) of each text. The index of a text is its slot in the cache."""
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    offsets = [0, *accumulate(lengths)]
    return Row(
        ids_T=torch.tensor([t for text, a, b in zip(texts, starts, ends, strict=True) for t in text[a:b]]),
        position_T=torch.tensor([i for a, b in zip(starts, ends, strict=True) for i in range(a, b)]),
        spans=tuple(Span(offsets[i], offsets[i + 1], past, i) for i, past in enumerate(starts)),
        counts=(0,) * len(texts),
        at_N=torch.empty(0, dtype=torch.long),
        target_N=torch.empty(0, dtype=torch.long),
        weight_N=torch.empty(0),
        slots=(Slice(None, 0, offsets[-1]),),
    )
