"""Loss and logits of a row, computed only at its labels and in chunks, so that all logits never exist at once.

The backward pass of a chunk runs right after its forward pass, and only the gradient of the hidden states is kept.

    N = labels of the row, C = labels of a chunk, H = hidden size, V = vocabulary size
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.fused.products import product_of_packed
from lorasmith.lora.quantized import QuantizedLinear
from lorasmith.lora.quantized_weight import QuantizedWeight
from lorasmith.lora.router import Slice
from lorasmith.model.attention import Cache
from lorasmith.model.base import Base
from lorasmith.model.forward import has_short_slices, hidden, packed_inputs, padded_output
from lorasmith.model.row import Objective, Row

FROZEN_CHUNK = 160  # labels of a chunk, at most, if the head is frozen
CHUNK = 128  # labels of a chunk otherwise: the fastest of 32 to 640 on two cores with a vocabulary of 49,152


def loss_sum(base: Base, row: Row, objective: Objective | None = None) -> Tensor:
    """Sum of weight x cross-entropy over the row's labels: a scalar in float32 that can be differentiated.

    objective: another loss, a function of the cross-entropies. Its gradient is that of the sum in which each label has
    the derivative as its weight, so it takes no second pass through the decoder.
    """
    if not base.head.direct:
        losses_N = _losses_of_model(base, row)
        if objective is None:
            return (losses_N * row.weight_N.to(losses_N.dtype)).sum()
        value, weight_N = objective(losses_N.detach())
        return _with_value((losses_N * weight_N.to(losses_N.dtype)).sum(), value)
    states_NH = hidden(base, row).index_select(0, row.at_N)
    weight = _frozen_weight(base) if "head" in base.fast_parts else None
    if weight is not None:
        made = objective or _weighted(row)
        return _FrozenHead.apply(states_NH, weight, base.head.scale, row, made)  # type: ignore[no-any-return, no-untyped-call]
    trained = [p for p in base.output_embedding.parameters() if p.requires_grad]
    decoder_slices = base.router.slices
    if objective is None:
        loss: Tensor = _ChunkedLoss.apply(states_NH, base, row, *trained)  # type: ignore[no-untyped-call]
    else:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):  # the same dropout again below
            value, weight_N = objective(_losses_of_states(base, row, states_NH.detach()))
        weighted = replace(row, weight_N=weight_N)
        loss = _with_value(_ChunkedLoss.apply(states_NH, base, weighted, *trained), value)  # type: ignore[no-untyped-call]
    base.router.route(decoder_slices)  # which a recomputation in backward needs
    return loss


def _weighted(row: Row) -> Objective:
    """The objective of `loss_sum` without another one."""

    def weighted(losses_N: Tensor) -> tuple[Tensor, Tensor]:
        weight_N = row.weight_N.to(losses_N.dtype)
        return losses_N @ weight_N, weight_N

    return weighted


def _with_value(loss: Tensor, value: Tensor) -> Tensor:
    """A scalar with this value and the gradient of `loss`."""
    return value.to(loss.dtype) + (loss - loss.detach())


@torch.no_grad()
def token_losses(base: Base, row: Row) -> Tensor:
    """Cross-entropy of each label, [N] in float32, without gradient."""
    if not base.head.direct:
        return _losses_of_model(base, row)
    return _losses_of_states(base, row, hidden(base, row).index_select(0, row.at_N))


@torch.no_grad()
def _losses_of_states(base: Base, row: Row, states_NH: Tensor) -> Tensor:
    """Cross-entropy of each label from its hidden state, [N]. Sets the router for each chunk."""
    losses = []
    for start, end in label_chunks(row, base):
        losses.append(_cross_entropy(logits(base, states_NH[start:end]), row.target_N[start:end]))
    return torch.cat(losses)


@torch.no_grad()
def next_logits(base: Base, row: Row, kv: Cache) -> Tensor:
    """Logits at the positions `at_N` of a packed row with a KV cache, [N, V] in float32, for all adapters at once."""
    if not base.head.direct:
        base.router.route(row.slots, stacked=has_short_slices(row.slots))
        return kept_logits(base, row, kv).float()
    states_NH = hidden(base, row, kv).index_select(0, row.at_N)
    if not len(states_NH):
        return states_NH.float()
    slices = label_slices(row)
    base.router.route(slices, stacked=has_short_slices(slices))
    return logits(base, states_NH).float()


def label_slices(row: Row) -> list[Slice]:
    """The row's slots in labels, without those that have none."""
    if row.label_slots is not None:
        return list(row.label_slots)
    if len(row.slots) == 1:  # spans may be common prefixes, which `counts` does not know
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
    """Logits [N, V] of hidden states [N, H], equal to those of the model. The router must be set."""
    packed_VH = base.fast_decoder.packed_head if base.fast_decoder else None
    out: Tensor = base.output_embedding(states_NH) if packed_VH is None else product_of_packed(states_NH, packed_VH)
    out = out if base.head.scale == 1 else out * base.head.scale
    cap = base.head.softcap
    return out if cap is None else torch.tanh(out / cap) * cap


def frozen_matrix(base: Base) -> Tensor | None:
    """The head's weight [V, H], or None if the head is trained, quantized or more than this matrix."""
    weight = _frozen_weight(base)
    return weight if isinstance(weight, Tensor) else None


def _frozen_weight(base: Base) -> Tensor | QuantizedWeight | None:
    """The head's weight [V, H], or None if the head is trained or more than this matrix."""
    head = base.output_embedding
    is_matrix = type(head) in (nn.Linear, QuantizedLinear) and head._parameters["bias"] is None
    if not is_matrix or base.head.softcap is not None:
        return None
    if isinstance(head, QuantizedLinear):
        return head.quantized
    weight = head.get_parameter("weight")
    return None if weight.requires_grad else weight


class _FrozenHead(torch.autograd.Function):
    """The loss at a frozen head matrix W, with the gradient scale * weight * (softmax(logits) - 1_target) W.

    The objective gives the weight of each label when all losses are known.

    Logits and probabilities exist for one chunk at a time, in the head's dtype. In bfloat16 this rounds each
    probability once more, by at most 0.4%, which the reported loss shows; the gradient would be rounded there anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, W: Tensor | QuantizedWeight, scale: float, row: Row, objective: Objective
    ) -> Tensor:
        """Hidden states at the labels [N, H] -> the objective, float32. Losses above 87 nats count as 87."""
        scaled_NH = states_NH if scale == 1 else states_NH * scale
        wide = torch.promote_types(states_NH.dtype, torch.float32)
        d_NH, losses_N = torch.empty_like(states_NH), states_NH.new_empty(len(states_NH), dtype=wide)
        size = _even_chunk(len(states_NH))
        logits_CV = states_NH.new_empty(size, W.shape[0])
        for start in range(0, len(states_NH), size):
            end = min(start + size, len(states_NH))
            part_CV = _product(scaled_NH[start:end], W, logits_CV[: end - start])
            P_CV = torch.softmax(part_CV, dim=-1, out=part_CV)
            p_C1 = P_CV.gather(1, row.target_N[start:end, None]).to(wide)
            losses_N[start:end] = p_C1[:, 0].clamp_min(torch.finfo(torch.float32).tiny).log().neg()
            _back_through(P_CV, W, d_NH[start:end])
        value, weight_N = objective(losses_N)
        d_NH.sub_(W.index_select(0, row.target_N) if isinstance(W, Tensor) else W.at(row.target_N))
        ctx.save_for_backward((d_NH.to(wide) * (weight_N.to(wide) * scale)[:, None]).to(d_NH.dtype))
        return value.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient was computed in forward; d_loss is 1 unless the loss is scaled."""
        (d_NH,) = ctx.saved_tensors
        return d_NH * d_loss.to(d_NH.dtype), None, None, None, None


def _product(x_CH: Tensor, W: Tensor | QuantizedWeight, out_CV: Tensor) -> Tensor:
    return torch.mm(x_CH, W.t(), out=out_CV) if isinstance(W, Tensor) else W.product(x_CH, out_CV)


def _back_through(P_CV: Tensor, W: Tensor | QuantizedWeight, out_CH: Tensor) -> Tensor:
    return torch.mm(P_CV, W, out=out_CH) if isinstance(W, Tensor) else W.add_product(P_CV, out_CH.zero_())


def _even_chunk(labels: int) -> int:
    """Size of equal chunks: a small last chunk would read all weights for little."""
    chunks = max(1, -(-labels // FROZEN_CHUNK))
    return max(1, -(-labels // chunks))


class _ChunkedLoss(torch.autograd.Function):
    """The loss at any other head, by autograd in each chunk. `trained`: the head's parameters that get a gradient."""

    @staticmethod
    def forward(ctx: Any, states_NH: Tensor, base: Base, row: Row, *trained: nn.Parameter) -> Tensor:
        d_states = torch.empty_like(states_NH)
        d_trained: list[Tensor | None] = [None] * len(trained)  # None for parameters of adapters that no token uses
        total = torch.zeros((), dtype=torch.promote_types(states_NH.dtype, torch.float32), device=states_NH.device)
        for start, end in label_chunks(row, base):
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


def label_chunks(row: Row, base: Base) -> Iterator[tuple[int, int]]:
    """Bounds of the chunks, each of labels with the same adapter. Sets the router for each chunk."""
    for adapter, first, last in label_slices(row):
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            base.router.route([Slice(adapter, 0, stop - start)])
            yield start, stop


def kept_logits(base: Base, row: Row, kv: Cache | None = None) -> Tensor:
    """The model's own logits [N, V] at the positions `at_N` of a packed row. The router must be set."""
    # the head may carry adapters, whose slices count every token of the row
    keep = row.at_N if len(row.slots) == 1 else torch.arange(row.tokens, device=row.at_N.device)
    out: Tensor = base.model(**packed_inputs(base, row, kv), logits_to_keep=keep).logits[0]
    return out if len(row.slots) == 1 else out.index_select(0, row.at_N)


def _losses_of_model(base: Base, row: Row) -> Tensor:
    """Cross-entropy of each label from the model's own logits, for a head that is more than a linear layer: [N]."""
    if base.layout == "packed":
        base.router.route(row.slots)
        logits_NV = kept_logits(base, row)
    else:
        logits_NV = padded_output(base, row, base.model, "logits", row.at_N)
    return _cross_entropy(logits_NV, row.target_N)
