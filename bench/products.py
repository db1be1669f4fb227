"""The limit: the products of a training step that cannot be avoided, timed alone.

For each frozen linear layer x W^T, and dy W where something trained lies before it; the head, both ways, at the labels
alone. No gradient of a frozen weight, no adapter, no attention, nothing element by element. The weights are as many as
the model's, one after the other, so that they stream through the caches as in a real step.

    T = tokens that a row computes, N = its labels, I = width of the input, O = width of the output
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.target import find_targets


class Linear(NamedTuple):
    """Shape of a frozen layer, and whether its input needs a gradient."""

    path: str
    inputs: int
    outputs: int
    backward: bool


class Size(NamedTuple):
    """What a row asks of the products: tokens through the layers, labels through the head."""

    tokens: int
    labels: int


def linear_layers(model: Path, lora: LoraConfig) -> list[Linear]:
    """The model's linear layers in the order of their use, its head last; `lora` says what is trained.

    Found by following the gradient through a model without weights, as transformers builds it.
    """
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    targets = find_targets(empty, lora)
    trained = {*targets.adapted, *(path for paths in targets.saved.values() for path in paths)}
    found: dict[str, Linear] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            found[path] = Linear(path, module.in_features, module.out_features, inputs[0].requires_grad)

        return hook

    for path, module in empty.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(path))
        if path in trained:  # what comes out of it depends on something trained
            module.register_forward_hook(lambda _module, _inputs, output: output.detach().requires_grad_(True))
    with torch.device("meta"):  # a mask of four dimensions is taken as it is; another one would be looked into
        empty(input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 1, 4, 4), use_cache=False)
    return list(found.values())


class Products:
    """Random weights of these shapes and room for the largest row; the last layer is the head."""

    def __init__(self, layers: Sequence[Linear], dtype: torch.dtype, largest: Size) -> None:
        *self.layers, self.head = layers
        self.weights = [torch.randn(layer.outputs, layer.inputs).mul_(0.02).to(dtype) for layer in layers]
        widths = {width for layer in self.layers for width in (layer.inputs, layer.outputs)}
        self.given = {width: torch.randn(largest.tokens, width).to(dtype) for width in widths}
        self.made = {width: torch.empty(largest.tokens, width, dtype=dtype) for width in widths}
        self.states = torch.randn(largest.labels, self.head.inputs).to(dtype)
        self.logits = torch.randn(largest.labels, self.head.outputs).to(dtype)
        self.operations = 0

    def seconds(self, sizes: Sequence[Size]) -> float:
        """Time of the products of a step with these rows. `operations` then holds how many it took, for GFLOP/s."""
        self.operations = sum(self._operations(size) for size in sizes)
        started = time.perf_counter()
        for size in sizes:
            self._step(*size)
        return time.perf_counter() - started

    def _step(self, T: int, N: int) -> None:
        layers = list(zip(self.layers, self.weights, strict=False))  # the head's weight is one more
        for layer, W_OI in layers:
            torch.mm(self.given[layer.inputs][:T], W_OI.t(), out=self.made[layer.outputs][:T])
        torch.mm(self.states[:N], self.weights[-1].t(), out=self.logits[:N])
        if self.head.backward:
            torch.mm(self.logits[:N], self.weights[-1], out=self.states[:N])
        for layer, W_OI in reversed(layers):
            if layer.backward:
                torch.mm(self.given[layer.outputs][:T], W_OI, out=self.made[layer.inputs][:T])

    def _operations(self, size: Size) -> int:
        def of(layer: Linear, rows: int) -> int:
            return 2 * rows * layer.inputs * layer.outputs * (1 + layer.backward)

        return sum(of(layer, size.tokens) for layer in self.layers) + of(self.head, size.labels)
