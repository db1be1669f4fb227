"""Attention inside each example of a flat row: the function that transformers calls in place of its own.

    T = tokens of the row, L = tokens of one span, H = heads, D = head size

Registered under "lorasmith" in transformers' AttentionInterface; the row and the cache arrive as plain keywords of
`model(...)`, so that checkpointing's recomputation sees the same ones. Queries and keys are [1, H, T, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Group:
    """Spans of a row that attend in one product: all single decoded tokens, or one piece of a prompt.

    G = spans of the group, fillers included; L = new tokens of each; S = tokens of the longest, the cache's included
    """

    where: slice | Tensor  # its G places in the cache
    longest: int  # S
    position_GL: Tensor
    from_T: Tensor  # G * L places in the row to take queries from
    to_T: Tensor  # and to put outputs to; a filler's is one behind the row's end
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int) -> Tensor:
        """True where a query sees a key, [G, 1, repeat * L, S]; made once a row, not once a layer."""
        key = (window, repeat)
        if key not in self.masks:
            keys_S = torch.arange(self.longest, device=self.position_GL.device)
            self.masks[key] = visible(self.position_GL, keys_S, window)[:, None].repeat(1, 1, repeat, 1)
        return self.masks[key]


class Cache(Protocol):
    """Keys and values of earlier tokens. See engine/kv.py."""

    @property
    def groups(self) -> Sequence[Group]:
        """The row's spans, grouped."""

    def begin(self, spans: Sequence[Span], device: torch.device) -> None:
        """Make room for a row's tokens and group its spans: once, before its forward."""

    def extend(self, layer: int, k_HTD: Tensor, v_HTD: Tensor) -> None:
        """Append the row's keys and values behind what each span's slot holds."""

    def read(self, layer: int, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values [G, H, S, D] of a group, its new tokens included; behind a span's own end is garbage."""


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
    if row is None:
        raise ModelError(_("{kind} does not pass the row on to its attention", kind=type(module).__name__))
    unknown += ["dropout"] * bool(dropout) + ["attention_mask"] * (attention_mask is not None)
    if unknown:
        names = ", ".join(unknown)
        raise ModelError(_("{kind} asks its attention for {names}", kind=type(module).__name__, names=names))
    if kv is None:
        out = _inside_spans(query, key, value, row, scaling, sliding_window)
    else:
        out = _with_cache(query, key, value, scaling, sliding_window, kv, int(module.layer_idx))  # type: ignore[arg-type]
    return out.transpose(1, 2), None


def _inside_spans(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scaling: float | None, window: int | None
) -> Tensor:
    lengths = [span.length for span in spans]
    pieces = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    return torch.cat([_causal(q1, k1, v1, scaling, window) for q1, k1, v1 in pieces], dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One example alone; a mask only where a window cuts something off. Tensors [1, H, L, D]."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    position = torch.arange(length, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(position, position, window), scale=scaling)


def _with_cache(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, kv: Cache, layer: int
) -> Tensor:
    """Each group in one product; the query heads that share a key head stand as further queries of it."""
    kv.extend(layer, k[0], v[0])
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    q_THD = q[0].transpose(0, 1)  # how it lies in memory
    out_THD = q.new_empty(len(q_THD) + 1, heads, v.shape[3])  # one more token, for what fillers compute
    for group in kv.groups:
        keys, values = kv.read(layer, group)
        q_GLHD = q_THD.index_select(0, group.from_T).unflatten(0, (len(keys), -1))
        q_GKQD = q_GLHD.transpose(1, 2).reshape(len(keys), k.shape[1], -1, q.shape[3])
        mask = group.mask(window, shared)
        o_GKQD = F.scaled_dot_product_attention(q_GKQD, keys, values, attn_mask=mask, scale=scaling)
        o_GHLD = o_GKQD.reshape(len(keys), heads, -1, v.shape[3])
        out_THD.index_copy_(0, group.to_T, o_GHLD.transpose(1, 2).flatten(0, 1))
    return out_THD[None, :-1].transpose(1, 2)


def visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """True where a query sees a key: not later, and inside the window. [..., L] and [S] -> [..., L, S]."""
    distance = query_position[..., None] - key_position
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _repeat(t: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: each key head serves heads / Hkv query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


AttentionInterface.register(NAME, attend)
