"""How much of a row's forward is kept for its backward: counted in a trial, and from that foretold for another row."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
