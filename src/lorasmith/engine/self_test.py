"""A self-test of each model: are packed rows with a KV cache, the adapter bank and the decoder stack correct?"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lorasmith.engine.kv_cache import KVCache
from lorasmith.errors import ModelError, first_line
from lorasmith.i18n import _
from lorasmith.lora.router import Slice
from lorasmith.model.base import Base
from lorasmith.model.fast.decoder import FastDecoder
from lorasmith.model.forward import hidden
from lorasmith.model.probe import TOLERANCE
from lorasmith.model.row import Row, Span


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
    if base.layout != "packed":
        decoder.problem = base.why.get("layout", "")
        return
    words = int(base.model.config.get_text_config().vocab_size)
    ids = [(7 * i + 3) % (words - 2) for i in range(12)]
    texts = ids[:5], ids[5:]
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
