"""From a flat row to hidden states: packed where the probe allows it, padded elsewhere. Flat in, flat out.

T = tokens of the row, H = width, B = examples, L = the longest of them
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.lora.router import Slice
from lorasmith.model.attention import Cache
from lorasmith.model.base import Base
from lorasmith.model.group import grouped
from lorasmith.model.row import Example, Row, flatten

THIN = 16  # tokens of one adapter: up to so many on average, all adapters go in one product under a mask
MULTIPLE = 32  # tokens that a packed row is filled up to where every length means new kernels


def row_of(base: Base, examples: Sequence[Example], total_weight: float, adapter: str | None) -> Row:
    """`flatten` for this model, on its device. What examples share stands once, unless dropout makes it differ."""
    if base.layout == "padded":
        return flatten(examples, total_weight, adapter).to(base.device)
    drops = base.model.training and adapter is not None and base.adapters[adapter].config.lora_dropout > 0
    multiple = MULTIPLE if base.compiles_shapes else 1
    return flatten(examples, total_weight, adapter, "prefix" in base.fast and not drops, multiple).to(base.device)


def hidden(base: Base, row: Row, kv: Cache | None = None) -> Tensor:
    """The decoder's last hidden states [T, H] of a row, each token with its own adapter. Sets the router."""
    if base.layout == "packed":
        return _packed(base, row, kv)
    return _padded(base, row)


def _packed(base: Base, row: Row, kv: Cache | None) -> Tensor:
    base.router.route(row.slots, stacked=kv is not None and is_thin(row.slots))
    if kv is not None and base.decoding is not None and base.decoding.stack is not None:
        return base.decoding.stack(row.ids_T, row.position_T, kv.begin(row.spans, row.ids_T.device), kv)
    out = base.decoder(**packed_inputs(base, row, kv))
    states: Tensor = out.last_hidden_state[0]
    return states


def is_thin(slots: Sequence[Slice]) -> bool:
    """Whether few tokens of several adapters follow each other, so that all adapters in one product are faster."""
    return len(slots) > 1 and slots[-1].end <= THIN * len(slots)


def packed_inputs(base: Base, row: Row, kv: Cache | None = None) -> dict[str, Any]:
    """Keywords of a model call on a packed row; makes room in the cache. No mask and no cache of transformers'."""
    lengths, device = [span.length for span in row.spans], row.ids_T.device
    ends = torch.tensor([0, *(span.end for span in row.spans)], dtype=torch.int32)
    return {
        "input_ids": row.ids_T[None],
        "position_ids": row.position_T[None],
        "attention_mask": None,
        "use_cache": False,
        "row": grouped(row.spans, device) if kv is None else kv.begin(row.spans, device),
        "by_hand": "attention" in base.fast,
        "kv": kv,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def _padded(base: Base, row: Row) -> Tensor:
    inputs, at_T = padded_inputs(row)
    base.router.route(padded_slices(row))
    out = base.decoder(**inputs, use_cache=False).last_hidden_state
    states: Tensor = out.flatten(0, 1).index_select(0, at_T)
    return states


def padded_inputs(row: Row) -> tuple[dict[str, Tensor], Tensor]:
    """input_ids and attention_mask [B, L], padded on the right, and each token's place [T] in them, flattened."""
    longest = max(span.length for span in row.spans)
    at = [i * longest + offset for i, span in enumerate(row.spans) for offset in range(span.length)]
    at_T = torch.tensor(at, dtype=torch.long, device=row.ids_T.device)
    shape = (len(row.spans), longest)
    ids_BL, mask_BL = row.ids_T.new_zeros(shape), row.ids_T.new_zeros(shape)
    ids_BL.view(-1)[at_T] = row.ids_T
    mask_BL.view(-1)[at_T] = 1
    return {"input_ids": ids_BL, "attention_mask": mask_BL}, at_T


def padded_slices(row: Row) -> list[Slice]:
    """The row's slots, counted in padded tokens: a slot holds whole spans."""
    longest = max(span.length for span in row.spans)
    starts = {span.start: i for i, span in enumerate(row.spans)} | {row.tokens: len(row.spans)}
    return [Slice(slot.adapter, starts[slot.start] * longest, starts[slot.end] * longest) for slot in row.slots]
