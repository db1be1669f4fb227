"""Attention in packed rows: the function that transformers calls instead of its own.

It is registered as "lorasmith" in transformers' AttentionInterface. The row's groups and the KV cache are passed as
keyword arguments of `model(...)`, so that gradient checkpointing recomputes with the same ones.

    T = tokens of the row; Hq, Hkv = query and key heads; D = head size; G, L, S as in groups.py
    M = G * Hkv products of a group; Q = L * Hq / Hkv queries of each: heads that share a key head count as more queries
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from lorasmith.errors import ModelError
from lorasmith.i18n import _, listed
from lorasmith.model.groups import AttentionGroup
from lorasmith.model.row import Span

IMPLEMENTATION = "lorasmith"  # the name for `set_attn_implementation`
# keyword arguments that repeat what the spans say, or that only affect what is returned
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "return_dict", "logits_to_keep",
    "num_items_in_batch", "position_embeddings",
}  # fmt: skip


class RemembersOptions(nn.Module):
    """An attention module that remembers the options of its call of `attend`, so that its fast class can use them."""

    attention_options: dict[str, Any] | None = None  # scaling and sliding_window; None before the first call


class Cache(Protocol):
    """A KV cache, with the keys and values of earlier tokens; engine/kv_cache.py implements it."""

    def begin(self, spans: Sequence[Span], device: torch.device) -> Sequence[AttentionGroup]:
        """Make room for the tokens of a row, and return its groups. Called once before each forward pass."""

    def extend(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Append the row's keys and values to those in the slot of each span."""

    def read(self, layer: int, group: AttentionGroup) -> tuple[Tensor, Tensor]:
        """Keys and values of a group, each [G, Hkv, S, D], new tokens included. Undefined behind the end of a span."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    row: Sequence[AttentionGroup] | None = None,
    by_hand: bool = True,
    kv: Cache | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention in a packed row. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None).

    row: its groups; kv: the cache, if the row continues earlier tokens. by_hand: use our own forward and backward
    instead of torch's scaled_dot_product_attention with autograd.

    Raises:
        ModelError: the model does not pass `row` on, or needs something that is not supported here. When the model is
            loaded, the probe then chooses the padded layout.
    """
    unknown = sorted(name for name, v in rest.items() if v is not None and v is not False and name not in _HARMLESS)
    if row is None:
        raise ModelError(_("{kind} does not pass the packed row on to its attention", kind=type(module).__name__))
    unknown += ["dropout"] * bool(dropout) + ["attention_mask"] * (attention_mask is not None)
    if unknown:
        names = listed(unknown)
        raise ModelError(
            _(
                "{kind} requires {names}, which packed attention does not support",
                kind=type(module).__name__,
                names=names,
            )
        )
    q_THD, k_THD, v_THD = (t[0].transpose(0, 1) for t in (query, key, value))  # the order in memory
    how = (query.shape[3] ** -0.5 if scaling is None else scaling, sliding_window)
    if isinstance(module, RemembersOptions):
        module.__dict__["attention_options"] = {"scaling": how[0], "sliding_window": sliding_window}
    if kv is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return attend_cached(q_THD, k_THD, v_THD, row, kv, layer, *how)[None], None
    compute = _by_hand if by_hand else _plainly
    return compute(q_THD, k_THD, v_THD, row, *how)[None], None


def attend_cached(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    row: Sequence[AttentionGroup],
    kv: Cache,
    layer: int,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Append the row's keys and values to the cache, and attend to all of them. Returns [T, Hq, D]."""
    kv.extend(layer, k_THD, v_THD)
    return _sdpa(q_THD, [kv.read(layer, group) for group in row], row, scaling, sliding_window)


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[AttentionGroup], scaling: float, window: int | None
) -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
    out_THD: Tensor = _ByHand.apply(q, k, v, groups, scaling, window)  # type: ignore[no-untyped-call]
    return out_THD


def _plainly(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[AttentionGroup], scaling: float, window: int | None
) -> Tensor:
    """The same by torch's own function with autograd: the reference."""
    kv = [tuple(_take(t, g.keys, g).unflatten(0, (g.blocks, -1)) for t in (k, v)) for g in groups]
    return _sdpa(q, kv, groups, scaling, window)


def _sdpa(
    q_THD: Tensor,
    kv: Sequence[tuple[Tensor, ...]],
    groups: Sequence[AttentionGroup],
    scaling: float,
    window: int | None,
) -> Tensor:
    """Attention by torch's own function. kv: keys and values of each group, [G, Hkv, S, D]. Returns [T, Hq, D]."""
    if all(group.row_slice is not None for group in groups):
        parts = [_in_order(q_THD, k, v, group, scaling, window) for group, (k, v) in zip(groups, kv, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    out_THD = q_THD.new_empty(
        len(q_THD) + 1, q_THD.shape[1], kv[0][1].shape[3]
    )  # one more row, for the outputs of padding
    for group, (k_GHSD, v_GHSD) in zip(groups, kv, strict=True):
        q_GHQD = _take(q_THD, group.from_T, group, k_GHSD.shape[1]).unflatten(0, (group.blocks, -1))
        mask = group.additive_mask(window, q_THD.shape[1] // k_GHSD.shape[1], q_THD.dtype)
        o_GHQD = F.scaled_dot_product_attention(q_GHQD, k_GHSD, v_GHSD, attn_mask=mask, scale=scaling)
        o_THD = _tokens_first(o_GHQD.flatten(0, 1), group, q_THD.shape[1])
        needs_grad = torch.is_grad_enabled()  # autograd does not allow it in place
        out_THD = (out_THD.index_copy if needs_grad else out_THD.index_copy_)(0, group.to_T, o_THD)
    return out_THD[:-1]


def _in_order(
    q_THD: Tensor, k_GHSD: Tensor, v_GHSD: Tensor, group: AttentionGroup, scaling: float, window: int | None
) -> Tensor:
    """The same for a group of single tokens that are adjacent in the row, as a view of it: [G, Hq, D]."""
    repeat = q_THD.shape[1] // k_GHSD.shape[1]
    q_GHRD = q_THD[group.row_slice].reshape(group.blocks, -1, repeat, q_THD.shape[2])
    mask = group.additive_mask(window, repeat, q_THD.dtype)
    return F.scaled_dot_product_attention(q_GHRD, k_GHSD, v_GHSD, attn_mask=mask, scale=scaling).flatten(1, 2)


class _ByHand(torch.autograd.Function):
    """softmax(scaling Q K^T) V by batched products. The gradient of a key is summed over all queries that see it.

    At the usual lengths of examples this is several times as fast as the flash kernel on a CPU, above all in backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[AttentionGroup], *how: Any) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]. how: scaling and sliding window."""
        out_THD = q.new_empty(len(q) + 1, q.shape[1], v.shape[2])  # one more row, for the outputs of padding
        for group in groups:
            P_MQS = _probabilities(q, k, group, *how)
            O_MQD = torch.bmm(P_MQS, _take(v, group.keys, group))
            out_THD.index_copy_(0, group.to_T, _tokens_first(O_MQD, group, q.shape[1]))
        ctx.save_for_backward(q, k, v)
        ctx.groups, ctx.how = groups, how
        return out_THD[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v = ctx.saved_tensors
        dq, dk, dv = q.new_empty(len(q) + 1, *q.shape[1:]), torch.zeros_like(k), torch.zeros_like(v)
        for group in ctx.groups:
            P_MQS = _probabilities(q, k, group, *ctx.how)
            dO_MQD = _take(d_out, group.from_T, group, k.shape[1], group.fillers)
            dP_MQS = torch.bmm(dO_MQD, _take(v, group.keys, group).transpose(1, 2))
            dS_MQS = torch._softmax_backward_data(dP_MQS, P_MQS, -1, P_MQS.dtype)
            dQ_MQD = torch.bmm(dS_MQS, _take(k, group.keys, group)).mul_(ctx.how[0])
            dK_MSD = torch.bmm(dS_MQS.transpose(1, 2), _take(q, group.from_T, group, k.shape[1])).mul_(ctx.how[0])
            dV_MSD = torch.bmm(P_MQS.transpose(1, 2), dO_MQD)
            dq.index_copy_(0, group.to_T, _tokens_first(dQ_MQD, group, q.shape[1]))
            dk.index_add_(0, group.keys, _tokens_first(dK_MSD, group, k.shape[1]))
            dv.index_add_(0, group.keys, _tokens_first(dV_MSD, group, v.shape[1]))
        return dq[:-1], dk, dv, None, None, None


def _probabilities(q_THD: Tensor, k_THD: Tensor, group: AttentionGroup, scaling: float, window: int | None) -> Tensor:
    """softmax(scaling Q K^T) of a group, [M, Q, S]; 0 where a query does not see a key."""
    Q_MQD, K_MSD = _take(q_THD, group.from_T, group, k_THD.shape[1]), _take(k_THD, group.keys, group)
    shape = (len(Q_MQD), Q_MQD.shape[1], K_MSD.shape[1])
    unset = Q_MQD.new_empty(()).expand(shape)
    scores_MQS = torch.baddbmm(unset, Q_MQD, K_MSD.transpose(1, 2), beta=0, alpha=scaling)
    first, bias = group.bias(window, q_THD.shape[1] // k_THD.shape[1], Q_MQD.dtype)
    scores_MQS[..., first:] += bias
    return torch.softmax(scores_MQS, dim=-1, out=scores_MQS)


def _take(
    t_THD: Tensor, places: Tensor, group: AttentionGroup, kv_heads: int | None = None, fillers: Tensor | None = None
) -> Tensor:
    """The queries or keys of a group, heads first: [M, Q or S, D]. Those in `fillers` are set to zero."""
    t = t_THD.index_select(0, places)
    t = t if fillers is None else t.index_fill_(0, fillers, 0)
    heads = kv_heads or t.shape[1]
    t_GLKRD = t.view(group.blocks, -1, heads, t.shape[1] // heads, t.shape[2])
    return t_GLKRD.permute(0, 2, 3, 1, 4).reshape(group.blocks * heads, -1, t.shape[2])


def _tokens_first(t_MQD: Tensor, group: AttentionGroup, heads: int) -> Tensor:
    """The inverse of `_take`: [M, Q or S, D] -> [G * L or G * S, heads, D]."""
    kv_heads = len(t_MQD) // group.blocks
    t_GKRLD = t_MQD.view(group.blocks, kv_heads, heads // kv_heads, -1, t_MQD.shape[2])
    return t_GKRLD.permute(0, 3, 1, 2, 4).reshape(-1, heads, t_MQD.shape[2])


AttentionInterface.register(IMPLEMENTATION, attend)
