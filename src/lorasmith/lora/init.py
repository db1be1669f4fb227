"""Initialization of a new adapter: A random, B zero, so that the model's output does not change."""

import math

import torch
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer
from lorasmith.lora.parameters import LoRAParameters


@torch.no_grad()
def initialize(
    layer: LoRALayer | LoRAEmbedding, adapter: str, config: LoraConfig, generator: torch.Generator | None
) -> None:
    """Initialize A and B of `adapter` in place. Random numbers come from the CPU, so the device makes no difference.

    default: A Kaiming-uniform with a = sqrt(5), as in torch's Linear and PEFT; gaussian: A from N(0, 1/r).
    For an embedding, A is zero and B from N(0, 1), as in PEFT and loralib. generator: None is torch's global one.
    """
    if isinstance(layer, LoRAEmbedding):
        zero, random = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        for matrix in (zero, random) if generator is None else ():
            torch.randn(matrix.shape, device=matrix.device)  # PEFT draws both once without using them
    else:
        random, zero = layer.updates[adapter].matrices
    nn.init.zeros_(zero)
    if not random.is_meta:
        random.copy_(_random(layer, random.shape, config, generator))
    if isinstance(layer, LoRALayer):
        layer.updates[adapter].start()


@torch.no_grad()
def initialize_parameters(
    layer: LoRAParameters, adapter: str, config: LoraConfig, generator: torch.Generator | None
) -> None:
    """Initialize A and B of `adapter` in place, as `initialize` does, each matrix of all experts as one, as in PEFT."""
    for update in layer.updates[adapter].values():
        nn.init.zeros_(update.lora_B)
        if not update.lora_A.is_meta:
            update.lora_A.copy_(_random(layer, update.lora_A.shape, config, generator, update.r))


def _random(
    layer: nn.Module,
    shape: torch.Size,
    config: LoraConfig,
    generator: torch.Generator | None,
    r: int | None = None,
) -> Tensor:
    values = torch.empty(shape, dtype=torch.float32)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(values, std=1 / (r or min(shape)), generator=generator)
    elif isinstance(layer, LoRAEmbedding):
        nn.init.normal_(values, generator=generator)
    else:
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values
