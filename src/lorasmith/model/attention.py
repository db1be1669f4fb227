"""Attention inside each example of a flat row: the function that transformers calls in place of its own.

    T = tokens of the row, L = tokens of one span, H = heads, D = head size

Registered under "lorasmith" in transformers' AttentionInterface; the row and the cache arrive as plain keywords of
`model(...)`, so that checkpointing's recomputation sees the same ones. Queries and keys are [1, H, T, D].
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorasmith.errors import ModelError
from lorasmith.i18n import _
from lorasmith.model.row import Span

NAME = "lorasmith"
# keywords that say what the spans say already, or that are about outputs alone
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "return_dict", "logits_to_keep",
    "num_items_in_batch", "position_embeddings",
}  # fmt: skip


class Cache(Protocol):
    """Keys and values of earlier tokens. See engine/kv.py."""

    def extend(self, layer: int, k_HTD: Tensor, v_HTD: Tensor, spans: Sequence[Span]) -> None:
        """Append the row's keys and values behind what each span's slot holds."""

    def read(self, layer: int, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Keys and values [spans, H, longest, D] of these spans, their new tokens included; the rest is garbage."""


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
    row: Sequence[Span] | None = None,
    kv: Cache | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each span. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None).

    Raises:
        ModelError: the row did not arrive, or the model asks for something that this function does not compute; the
            probe at load turns this into the padded layout.
    """
    unknown = sorted(name for name, v in rest.items() if v is not None and v is not False and name not in _HARMLESS)
    if row is None or unknown or dropout or attention_mask is not None:
        what = ", ".join(unknown) or ("the row" if row is None else "a mask or dropout")
        raise ModelError(_("{kind} calls attention with, or without, {what}.", kind=type(module).__name__, what=what))
    if kv is None:
        out = _inside_spans(query, key, value, row, scaling, sliding_window)
    else:
        out = _with_cache(query, key, value, row, scaling, sliding_window, kv, int(module.layer_idx))  # type: ignore[arg-type]
    return out.transpose(1, 2), None


def _inside_spans(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scaling: float | None, window: int | None
) -> Tensor:
    lengths = [span.length for span in spans]
    pieces = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    return torch.cat([_causal(*piece, scaling, window) for piece in pieces], dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One example alone; a mask only where a window cuts something off. Tensors [1, H, L, D]."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    position = torch.arange(length, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(position, position, window), scale=scaling)


def _with_cache(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scaling: float | None, window: int | None, kv: Cache, layer: int
) -> Tensor:
    """Single decoded tokens in one batch, each prefill chunk on its own."""
    kv.extend(layer, k[0], v[0], spans)
    out = torch.empty_like(q)
    decoding = [span for span in spans if span.length == 1]
    for group in ([decoding] if decoding else []) + [[span] for span in spans if span.length > 1]:
        keys, values = kv.read(layer, group)
        at_G = torch.tensor([i for span in group for i in range(span.start, span.end)], device=q.device)
        q_GHLD = q[0].index_select(1, at_G).unflatten(1, (len(group), -1)).transpose(0, 1)
        first = torch.tensor([span.past for span in group], device=q.device)[:, None]
        position_GL = first + torch.arange(q_GHLD.shape[2], device=q.device)
        mask = visible(position_GL, torch.arange(keys.shape[2], device=q.device), window)[:, None]
        o_GHLD = F.scaled_dot_product_attention(
            q_GHLD, _repeat(keys, q.shape[1]), _repeat(values, q.shape[1]), attn_mask=mask, scale=scaling
        )
        out[0].index_copy_(1, at_G, o_GHLD.transpose(0, 1).flatten(1, 2))
    return out


def visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """True where a query sees a key: not later, and inside the window. [..., L] and [S] -> [..., L, S]."""
    distance = query_position[..., None] - key_position
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _repeat(t: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: each key head serves heads / Hkv query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


AttentionInterface.register(NAME, attend)
