"""The loss at the labels alone, in chunks; logits are never kept.

    N = learned tokens of the row, C = chunk, H = width, V = vocabulary

A chunk's backward runs while its logits are still in the cache, so that only the gradient of the hidden states stays.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.lora.router import Slice
from lorasmith.model.attention import Cache
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden, is_thin, packed_inputs, padded_inputs, padded_slices
from lorasmith.model.row import Row

CHUNK = 128  # rows of logits at once: of 32 to 640 the fastest on two cores with 49,152 words


def loss_sum(base: Base, row: Row) -> Tensor:
    """Sum of weight x token loss over the row's labels, float32, ready for backward."""
    if not base.head.direct:
        losses_N = _losses_of_model(base, row)
        return (losses_N * row.weight_N.to(losses_N.dtype)).sum()
    states_NH = hidden(base, row).index_select(0, row.at_N)
    trained = [p for p in base.output_embedding.parameters() if p.requires_grad]
    during_decoder = base.router.slices
    loss: Tensor = _ChunkedLoss.apply(states_NH, base, row, *trained)  # type: ignore[no-untyped-call]
    base.router.route(during_decoder)  # what a recomputation in backward must see again
    return loss


@torch.no_grad()
def token_losses(base: Base, row: Row) -> Tensor:
    """The loss of each label [N], float32, without gradient."""
    if not base.head.direct:
        return _losses_of_model(base, row)
    states_NH = hidden(base, row).index_select(0, row.at_N)
    losses = []
    for start, end in _chunks(row, base):
        losses.append(_cross_entropy(logits(base, states_NH[start:end]), row.target_N[start:end]))
    return torch.cat(losses)


@torch.no_grad()
def next_logits(base: Base, row: Row, kv: Cache) -> Tensor:
    """Logits [N, V], float32, at the places `at_N` of a packed row with a cache; every adapter of the row at once."""
    if not base.head.direct:
        base.router.route(row.slots, stacked=is_thin(row.slots))
        # the head may carry adapters, whose slices count every token of the row
        keep = row.at_N if len(row.slots) == 1 else torch.arange(row.tokens, device=row.at_N.device)
        out: Tensor = base.model(**packed_inputs(row, kv), logits_to_keep=keep).logits[0]
        return (out if len(row.slots) == 1 else out.index_select(0, row.at_N)).float()
    states_NH = hidden(base, row, kv).index_select(0, row.at_N)
    if not len(states_NH):
        return states_NH.float()
    slices = label_slices(row)
    base.router.route(slices, stacked=is_thin(slices))
    return logits(base, states_NH).float()


def label_slices(row: Row) -> list[Slice]:
    """The row's slots counted in labels; those without one are left out."""
    if len(row.slots) == 1:  # its spans may be shared by several examples
        return [Slice(row.slots[0].adapter, 0, len(row.at_N))] if len(row.at_N) else []
    slices: list[Slice] = []
    first = 0
    for slot in row.slots:
        inside = (
            count for span, count in zip(row.spans, row.counts, strict=True) if slot.start <= span.start < slot.end
        )
        last = first + sum(inside)
        if last > first:
            slices.append(Slice(slot.adapter, first, last))
        first = last
    return slices


def logits(base: Base, states_NH: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H], as the model itself computes them. The router must be set."""
    out: Tensor = base.output_embedding(states_NH)
    out = out if base.head.scale == 1 else out * base.head.scale
    cap = base.head.softcap
    return out if cap is None else torch.tanh(out / cap) * cap


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_NH: Tensor, base: Base, row: Row, *trained: nn.Parameter) -> Tensor:
        d_states = torch.empty_like(states_NH)
        d_trained: list[Tensor | None] = [None] * len(trained)  # None: of an adapter that no token here uses
        total = torch.zeros((), dtype=torch.promote_types(states_NH.dtype, torch.float32), device=states_NH.device)
        for start, end in _chunks(row, base):
            with torch.enable_grad():
                states_CH = states_NH[start:end].detach().requires_grad_(True)
                losses_C = _cross_entropy(logits(base, states_CH), row.target_N[start:end])
                loss = (losses_C * row.weight_N[start:end].to(losses_C.dtype)).sum()
            d_chunk, *d_chunk_trained = torch.autograd.grad(loss, [states_CH, *trained], allow_unused=True)
            d_states[start:end] = d_chunk
            for i, chunk in enumerate(d_chunk_trained):
                d_trained[i] = _sum(d_trained[i], chunk)
            total = total + loss.detach()
        ctx.save_for_backward(d_states, *d_trained)
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_states, *d_trained = (None if g is None else g * d_loss for g in ctx.saved_tensors)
        return d_states, None, None, *d_trained


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.add_(b)


def _cross_entropy(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    wide = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    return F.cross_entropy(wide, target_C, reduction="none")


def _chunks(row: Row, base: Base) -> Iterator[tuple[int, int]]:
    """Bounds of chunks of labels that share an adapter; sets the router for each."""
    for adapter, first, last in label_slices(row):
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            base.router.route([Slice(adapter, 0, stop - start)])
            yield start, stop


def _losses_of_model(base: Base, row: Row) -> Tensor:
    """The plain way, for a head that is more than a linear layer: all logits from the model itself."""
    if base.layout == "packed":
        base.router.route(row.slots)
        logits_NV = base.model(**packed_inputs(row), logits_to_keep=row.at_N).logits[0]
    else:
        inputs, at_T = padded_inputs(row)
        base.router.route(padded_slices(row))
        places = at_T.index_select(0, row.at_N)
        logits_NV = base.model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, places)
    return _cross_entropy(logits_NV, row.target_N)
