"""The loss at the labels alone, in chunks; logits are never kept.

    N = learned tokens of the row, C = chunk, H = width, V = vocabulary

A chunk's backward runs while its logits are still in the cache, so that only the gradient of the hidden states stays.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.fused.products import product_of_packed
from lorasmith.lora.router import Slice
from lorasmith.model.attention import Cache
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden, is_thin, packed_inputs, padded_inputs, padded_slices
from lorasmith.model.row import Row

LARGEST = 160  # labels of one chunk at a frozen head
CHUNK = 128  # rows of logits at once: of 32 to 640 the fastest on two cores with 49,152 words


def loss_sum(base: Base, row: Row) -> Tensor:
    """Sum of weight x token loss over the row's labels, float32, ready for backward."""
    if not base.head.direct:
        losses_N = _losses_of_model(base, row)
        return (losses_N * row.weight_N.to(losses_N.dtype)).sum()
    states_NH = hidden(base, row).index_select(0, row.at_N)
    W_VH = frozen_matrix(base) if "head" in base.fast else None
    if W_VH is not None:
        return _FrozenHead.apply(states_NH, W_VH, base.head.scale, row)  # type: ignore[no-any-return, no-untyped-call]
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
        out: Tensor = base.model(**packed_inputs(base, row, kv), logits_to_keep=keep).logits[0]
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
    packed_VH = base.decoding.packed_head if base.decoding else None
    out: Tensor = base.output_embedding(states_NH) if packed_VH is None else product_of_packed(states_NH, packed_VH)
    out = out if base.head.scale == 1 else out * base.head.scale
    cap = base.head.softcap
    return out if cap is None else torch.tanh(out / cap) * cap


def frozen_matrix(base: Base) -> Tensor | None:
    """The head's weight [V, H], where the head is nothing else."""
    head = base.output_embedding
    if type(head) is not nn.Linear or base.head.softcap is not None:
        return None
    parameters = dict(head.named_parameters())
    return None if "bias" in parameters or parameters["weight"].requires_grad else parameters["weight"]


class _FrozenHead(torch.autograd.Function):
    """The loss at a head that is one frozen matrix W: its gradient is scale * weight * (softmax(logits) - 1_target) W.

    Logits and probabilities exist for one chunk at a time, in the head's dtype: in bfloat16 the loss that is shown
    carries one rounding a token more, at most 0.4% of a probability; the gradient would be rounded there anyway.
    """

    @staticmethod
    def forward(ctx: Any, states_NH: Tensor, W_VH: Tensor, scale: float, row: Row) -> Tensor:
        """States at the labels [N, H] -> the weighted sum of losses in float32; a loss beyond 87 nats counts as 87."""
        scaled_NH = states_NH if scale == 1 else states_NH * scale
        wide = torch.promote_types(states_NH.dtype, torch.float32)
        d_NH, losses_N = torch.empty_like(states_NH), states_NH.new_empty(len(states_NH), dtype=wide)
        size = _even_chunk(len(states_NH))
        logits_CV = states_NH.new_empty(size, len(W_VH))
        for start in range(0, len(states_NH), size):
            end = min(start + size, len(states_NH))
            torch.mm(scaled_NH[start:end], W_VH.t(), out=logits_CV[: end - start])
            part_CV = logits_CV[: end - start]
            P_CV = torch.softmax(part_CV, dim=-1, out=part_CV)
            p_C1 = P_CV.gather(1, row.target_N[start:end, None]).to(wide)
            losses_N[start:end] = p_C1[:, 0].clamp_min(torch.finfo(torch.float32).tiny).log().neg()
            torch.mm(P_CV, W_VH, out=d_NH[start:end])
        weight_N = row.weight_N.to(wide)
        d_NH.sub_(W_VH.index_select(0, row.target_N))
        ctx.save_for_backward((d_NH.to(wide) * (weight_N * scale)[:, None]).to(d_NH.dtype))
        return losses_N @ weight_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The loss is the last there is, so this is a multiplication by 1."""
        (d_NH,) = ctx.saved_tensors
        return d_NH * d_loss.to(d_NH.dtype), None, None, None


def _even_chunk(labels: int) -> int:
    """Chunks of one size, so that none is a small rest: the weights are read once a chunk, however small it is."""
    chunks = max(1, -(-labels // LARGEST))
    return max(1, -(-labels // chunks))


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
        logits_NV = base.model(**packed_inputs(base, row), logits_to_keep=row.at_N).logits[0]
    else:
        inputs, at_T = padded_inputs(row)
        base.router.route(padded_slices(row))
        places = at_T.index_select(0, row.at_N)
        logits_NV = base.model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, places)
    return _cross_entropy(logits_NV, row.target_N)
