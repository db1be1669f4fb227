"""Gradients for our own computations, also where the caller has turned them off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autograd_on() -> Iterator[None]:
    """Record gradients inside the block, also within the caller's torch.no_grad() or torch.inference_mode().

    The probe of a model needs them, and tensors that are made in inference mode could never be trained or changed.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield
