"""Compute the hidden states of a row: packed if the probe found that this model supports it, else padded.

T = tokens of the row, H = hidden size, B = examples, L = tokens of the longest
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.lora.alora import first_active
from lorasmith.lora.router import Slice
from lorasmith.model.attention import Cache
from lorasmith.model.base import Base
from lorasmith.model.groups import attention_groups
from lorasmith.model.row import Example, Row, Span, flatten, slices_of

SHORT_SLICE = 16  # up to so many tokens per adapter on average, one masked product for all adapters is faster
MULTIPLE = 32  # packed rows are padded to a multiple of so many tokens if every new shape costs time


def row_of(base: Base, examples: Sequence[Example], total_weight: float, adapter: str | None) -> Row:
    """`flatten` examples as this model needs them, on its device.

    Common prefixes are computed once, unless LoRA dropout would make them differ between examples.
    """
    starts = active_from(base, examples, adapter)
    if base.layout == "padded":
        return flatten(examples, total_weight, adapter, starts=starts).to(base.device)
    multiple = MULTIPLE if base.compiles_shapes else 1
    share = shares_prefixes(base, adapter if base.model.training else None)
    return flatten(examples, total_weight, adapter, share, multiple, starts).to(base.device)


def shares_prefixes(base: Base, trained: str | None) -> bool:
    """Whether rows compute common prefixes once. trained: the adapter that is being trained; None in an evaluation."""
    drops = trained is not None and base.adapters[trained].config.lora_dropout > 0
    return base.layout == "packed" and "prefix" in base.fast_parts and not drops


def active_from(base: Base, examples: Sequence[Example], adapter: str | None) -> list[int] | None:
    """The position from which on the adapter is active in each example; None if it always is, as only aLoRA is not."""
    if adapter not in base.router.partial:
        return None
    config = base.adapters[adapter].config
    return [first_active(one.whole_ids, config) for one in examples]


def hidden(base: Base, row: Row, kv: Cache | None = None) -> Tensor:
    """The decoder's last hidden states of a row, [T, H], each token computed with its own adapter. Sets the router."""
    if base.layout == "packed":
        return _packed(base, row, kv)
    return padded_output(base, row, base.decoder, "last_hidden_state")


def _packed(base: Base, row: Row, kv: Cache | None) -> Tensor:
    base.router.route(row.slots, stacked=kv is not None and has_short_slices(row.slots))
    if kv is not None and base.fast_decoder is not None and base.fast_decoder.stack is not None:
        return base.fast_decoder.stack(row.ids_T, row.position_T, kv.begin(row.spans, row.ids_T.device), kv)
    out = base.decoder(**packed_inputs(base, row, kv))
    states: Tensor = out.last_hidden_state[0]
    return states


def has_short_slices(slots: Sequence[Slice]) -> bool:
    """Whether there are several adapters with so few tokens each that one product for all adapters is faster."""
    return len(slots) > 1 and slots[-1].end <= SHORT_SLICE * len(slots)


def packed_inputs(base: Base, row: Row, kv: Cache | None = None) -> dict[str, Any]:
    """Keyword arguments of a model call on a packed row, without transformers' own mask and cache.

    The groups, the cache and `by_hand` arrive at `attention.attend`. Makes room in `kv` for the row's tokens.
    """
    lengths, device = [span.length for span in row.spans], row.ids_T.device
    ends = torch.tensor([0, *(span.end for span in row.spans)], dtype=torch.int32)
    return {
        "input_ids": row.ids_T[None],
        "position_ids": row.position_T[None],
        "attention_mask": None,
        "use_cache": False,
        "row": attention_groups(row.spans, device) if kv is None else kv.begin(row.spans, device),
        "by_hand": "attention" in base.fast_parts,
        "kv": kv,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def padded_output(base: Base, row: Row, model: nn.Module, name: str, at: Tensor | None = None) -> Tensor:
    """The output `name` of `model`, [B, L, ...], for the tokens `at` of a row; for all of them if `at` is None.

    The row is computed in one padded batch, or each example alone if the base is `one_by_one`. Sets the router.
    """
    if base.one_by_one and len(row.spans) > 1:
        parts = [padded_output(base, _alone(row, span), model, name) for span in row.spans]
        return torch.cat(parts) if at is None else torch.cat(parts).index_select(0, at)
    inputs, at_T = padded_inputs(row)
    base.router.route(padded_slices(row))
    out: Tensor = getattr(model(**inputs, use_cache=False), name)
    return out.flatten(0, 1).index_select(0, at_T if at is None else at_T.index_select(0, at))


def _alone(row: Row, span: Span) -> Row:
    """A row of the tokens of one span."""
    tokens, first = slice(span.start, span.end), span.start
    slots = [
        Slice(slot.adapter, max(slot.start, first) - first, min(slot.end, span.end) - first)
        for slot in row.slots
        if slot.start < span.end and first < slot.end
    ]
    return replace(
        row, ids_T=row.ids_T[tokens], position_T=row.position_T[tokens], spans=(Span(0, span.length),),
        slots=tuple(slots),
    )  # fmt: skip


def padded_inputs(row: Row) -> tuple[dict[str, Tensor], Tensor]:
    """input_ids and attention_mask, [B, L], padded on the right; and each token's index in them when flattened, [T]."""
    longest = max(span.length for span in row.spans)
    at = [i * longest + offset for i, span in enumerate(row.spans) for offset in range(span.length)]
    at_T = torch.tensor(at, dtype=torch.long, device=row.ids_T.device)
    shape = (len(row.spans), longest)
    ids_BL, mask_BL = row.ids_T.new_zeros(shape), row.ids_T.new_zeros(shape)
    ids_BL.view(-1)[at_T] = row.ids_T
    mask_BL.view(-1)[at_T] = 1
    return {"input_ids": ids_BL, "attention_mask": mask_BL}, at_T


def padded_slices(row: Row) -> list[Slice]:
    """The row's slots in padded tokens. The padding after a span has the adapter of the span's last token."""
    longest = max(span.length for span in row.spans)
    if row.label_slots is None:  # a slot consists of whole spans
        starts = {span.start: i for i, span in enumerate(row.spans)} | {row.tokens: len(row.spans)}
        return [Slice(slot.adapter, starts[slot.start] * longest, starts[slot.end] * longest) for slot in row.slots]
    adapters = [slot.adapter for slot in row.slots for _token in range(slot.start, slot.end)]
    own = [adapters[span.start : span.end] for span in row.spans]
    return list(slices_of([one for line in own for one in line + line[-1:] * (longest - len(line))]))
