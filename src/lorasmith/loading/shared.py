"""One loaded base model for several trainings that follow each other: each gets modules of its own on shared weights.

A training changes the modules of a base model (wrappers, added tokens, switched fast parts), and seldom its weights.
So a copy of the modules on the same weights is as good as a base model that was just loaded. Whether the last training
changed the weights, as full fine-tuning does, is seen from their checksums; then the base is loaded again.
"""

import copy
import gc

import torch
from torch import Tensor, nn

from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
from lorasmith.model.base import Base
from lorasmith.report import Report

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class SharedBase:
    """Gives copies of one base model, the last one that was asked for. Used like `load_base`."""

    def __init__(self) -> None:
        self.loads = 0  # how often a base was loaded
        self._config: ModelConfig | None = None
        self._base: Base | None = None
        self._sums = list[int]()

    def __call__(self, config: ModelConfig, report: Report | None = None) -> Base:
        """A base model as `load_base` gives it. Only one of the copies may be in use at a time. Raises as that does."""
        gc.collect()  # the copy of the training before, whose modules refer to each other
        if self._base is None or config != self._config or checksums(self._base) != self._sums:
            self._base = None
            self._base, self._config = load_base(config, report), config
            self._sums = checksums(self._base)
            self.loads += 1
        return on_same_weights(self._base)


def on_same_weights(base: Base) -> Base:
    """A copy of `base` with modules of its own, whose parameters and buffers share memory with the original's."""
    shared: dict[int, object] = {id(base.tokenizer): base.tokenizer}  # who adds tokens to it copies it before
    for parameter in base.model.parameters():
        if type(parameter) is nn.Parameter:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in base.model.buffers():
        if type(buffer) is Tensor:
            shared[id(buffer)] = buffer.detach()
    return copy.deepcopy(base, shared)


@torch.no_grad()
def checksums(base: Base) -> list[int]:
    """For each parameter and buffer, the sum of its bits as integers, which any change to the weights changes."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    return [int(_bits(tensor.detach()).sum(dtype=torch.int64)) for tensor in tensors if tensor.numel()]


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8 if flat.is_complex() else _INTEGERS[flat.element_size()])
