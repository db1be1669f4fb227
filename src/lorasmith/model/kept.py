"""How much of a row's forward is kept for its backward: counted in a trial, and from that foretold for another row."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorasmith.model.attention import KEPT
from lorasmith.model.base import Base
from lorasmith.model.group import grouped
from lorasmith.model.row import Row


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within it, what autograd keeps is noted: bytes by buffer, those of the model's own weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield found


def kept_per_token(base: Base, row: Row, found: dict[int, int]) -> float:
    """Bytes of one token, attention's probabilities left out: those grow with the length of the examples."""
    return max(0.0, (sum(found.values()) - probabilities(base, row)) / row.tokens)


def probabilities(base: Base, row: Row) -> int:
    """Bytes that attention by hand keeps of a packed row, in all layers."""
    if base.layout == "padded" or "attention" not in base.fast:
        return 0
    config = base.model.config.get_text_config()
    groups = [group for group in grouped(row.spans, row.ids_T.device) if group.longest <= KEPT]
    scores = sum(group.pieces * group.position_GL.shape[1] * group.longest for group in groups)
    return int(scores * config.num_attention_heads * config.num_hidden_layers * base.dtype.itemsize)
