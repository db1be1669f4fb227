"""Attention of a flat row: the function that transformers calls in place of its own.

    T = tokens of the row, H = heads, Hkv = key heads, D = head size; G, L, S as in group.py
    M = G * Hkv: the products of a group; Q = L * Hq / Hkv: heads that share a key head stand as further queries of it

Registered under "lorasmith" in transformers' AttentionInterface; the row's groups and the cache arrive as plain
keywords of `model(...)`, so that checkpointing's recomputation sees the same ones.
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
from lorasmith.model.group import Group
from lorasmith.model.row import Span

NAME = "lorasmith"
# keywords that say what the spans say already, or that are about outputs alone
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "return_dict", "logits_to_keep",
    "num_items_in_batch", "position_embeddings",
}  # fmt: skip


class Noting(nn.Module):
    """An attention module that keeps what it asked `attend` for, so that fast.py need not guess it."""

    how: dict[str, Any] | None = None  # scaling and window


class Cache(Protocol):
    """Keys and values of earlier tokens. See engine/kv_cache.py."""

    def begin(self, spans: Sequence[Span], device: torch.device) -> Sequence[Group]:
        """Make room for a row's tokens and group its spans: once, before its forward."""

    def extend(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Append the row's keys and values behind what each span's slot holds."""

    def read(self, layer: int, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [G, Hkv, S, D] of a group, its new tokens included; behind a span's own end is garbage."""


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
    row: Sequence[Group] | None = None,
    by_hand: bool = True,
    kv: Cache | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a row. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None).

    by_hand: forward and backward by plain products; else torch's own function, differentiated by autograd.

    Raises:
        ModelError: the row did not arrive, or the model asks for something that this function does not compute; the
            probe at load turns this into the padded layout.
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
    q_THD, k_THD, v_THD = (t[0].transpose(0, 1) for t in (query, key, value))  # how they lie in memory
    how = (query.shape[3] ** -0.5 if scaling is None else scaling, sliding_window)
    if isinstance(module, Noting):
        module.__dict__["how"] = {"scaling": how[0], "sliding_window": sliding_window}
    if kv is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return attend_cached(q_THD, k_THD, v_THD, row, kv, layer, *how)[None], None
    compute = _by_hand if by_hand else _plainly
    return compute(q_THD, k_THD, v_THD, row, *how)[None], None


def attend_cached(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    row: Sequence[Group],
    kv: Cache,
    layer: int,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Put the row's keys and values behind those of earlier tokens, and attend to both: [T, Hq, D]."""
    kv.extend(layer, k_THD, v_THD)
    return _sdpa(q_THD, [kv.read(layer, group) for group in row], row, scaling, sliding_window)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scaling: float, window: int | None) -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
    out_THD: Tensor = _ByHand.apply(q, k, v, groups, scaling, window)  # type: ignore[no-untyped-call]
    return out_THD


def _plainly(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scaling: float, window: int | None) -> Tensor:
    """The same by torch's own function under autograd: the oracle."""
    kv = [tuple(_take(t, g.keys, g).unflatten(0, (g.pieces, -1)) for t in (k, v)) for g in groups]
    return _sdpa(q, kv, groups, scaling, window)


def _sdpa(
    q_THD: Tensor, kv: Sequence[tuple[Tensor, ...]], groups: Sequence[Group], scaling: float, window: int | None
) -> Tensor:
    """Each group by torch's own function: keys and values [G, Hkv, S, D] of each -> [T, Hq, D]."""
    if all(group.rows is not None for group in groups):
        parts = [_in_order(q_THD, k, v, group, scaling, window) for group, (k, v) in zip(groups, kv, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    out_THD = q_THD.new_empty(len(q_THD) + 1, q_THD.shape[1], kv[0][1].shape[3])  # and a place for fillers
    for group, (k_GHSD, v_GHSD) in zip(groups, kv, strict=True):
        q_GHQD = _take(q_THD, group.from_T, group, k_GHSD.shape[1]).unflatten(0, (group.pieces, -1))
        mask = group.added(window, q_THD.shape[1] // k_GHSD.shape[1], q_THD.dtype)
        o_GHQD = F.scaled_dot_product_attention(q_GHQD, k_GHSD, v_GHSD, attn_mask=mask, scale=scaling)
        o_THD = _tokens_first(o_GHQD.flatten(0, 1), group, q_THD.shape[1])
        keeps = torch.is_grad_enabled()  # autograd wants it out of place
        out_THD = (out_THD.index_copy if keeps else out_THD.index_copy_)(0, group.to_T, o_THD)
    return out_THD[:-1]


def _in_order(
    q_THD: Tensor, k_GHSD: Tensor, v_GHSD: Tensor, group: Group, scaling: float, window: int | None
) -> Tensor:
    """Of a group that is a part of the row, one token a piece: no token is looked for by its place."""
    repeat = q_THD.shape[1] // k_GHSD.shape[1]
    q_GHRD = q_THD[group.rows].reshape(group.pieces, -1, repeat, q_THD.shape[2])
    mask = group.added(window, repeat, q_THD.dtype)
    return F.scaled_dot_product_attention(q_GHRD, k_GHSD, v_GHSD, attn_mask=mask, scale=scaling).flatten(1, 2)


class _ByHand(torch.autograd.Function):
    """softmax(scaling Q K^T) V by batched products; a key's gradient is the sum over all that see it.

    At the lengths of examples they beat the flash kernel on a CPU several times over, in backward above all.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], *how: Any) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]. how: scaling and window."""
        out_THD = q.new_empty(len(q) + 1, q.shape[1], v.shape[2])  # one more token, for what fillers compute
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


def _probabilities(q_THD: Tensor, k_THD: Tensor, group: Group, scaling: float, window: int | None) -> Tensor:
    """softmax(scaling Q K^T) [M, Q, S], zero where a query does not see a key."""
    Q_MQD, K_MSD = _take(q_THD, group.from_T, group, k_THD.shape[1]), _take(k_THD, group.keys, group)
    shape = (len(Q_MQD), Q_MQD.shape[1], K_MSD.shape[1])
    unset = Q_MQD.new_empty(()).expand(shape)
    scores_MQS = torch.baddbmm(unset, Q_MQD, K_MSD.transpose(1, 2), beta=0, alpha=scaling)
    first, bias = group.bias(window, q_THD.shape[1] // k_THD.shape[1], Q_MQD.dtype)
    scores_MQS[..., first:] += bias
    return torch.softmax(scores_MQS, dim=-1, out=scores_MQS)


def _take(
    t_THD: Tensor, places: Tensor, group: Group, kv_heads: int | None = None, fillers: Tensor | None = None
) -> Tensor:
    """A group's queries or keys, heads first: [M, Q or S, D]; fillers become zero where they are named."""
    t = t_THD.index_select(0, places)
    t = t if fillers is None else t.index_fill_(0, fillers, 0)
    heads = kv_heads or t.shape[1]
    t_GLKRD = t.view(group.pieces, -1, heads, t.shape[1] // heads, t.shape[2])
    return t_GLKRD.permute(0, 2, 3, 1, 4).reshape(group.pieces * heads, -1, t.shape[2])


def _tokens_first(t_MQD: Tensor, group: Group, heads: int) -> Tensor:
    """The inverse: [G * L or G * S, H, D]."""
    kv_heads = len(t_MQD) // group.pieces
    t_GKRLD = t_MQD.view(group.pieces, kv_heads, heads // kv_heads, -1, t_MQD.shape[2])
    return t_GKRLD.permute(0, 3, 1, 2, 4).reshape(-1, heads, t_MQD.shape[2])


AttentionInterface.register(NAME, attend)
