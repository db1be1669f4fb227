"""How a fresh adapter starts: B at zero, so that it changes nothing; A random."""

import math

import torch
from torch import Tensor, nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer


@torch.no_grad()
def initialise(layer: LoRALayer | LoRAEmbedding, adapter: str, config: LoraConfig, generator: torch.Generator) -> None:
    """Fill A and B of `adapter` in place, drawing on the CPU so that every device starts the same.

    default: A Kaiming-uniform with a = sqrt(5), as torch's Linear and PEFT; gaussian: A from N(0, 1/r).
    An embedding starts with A at zero and B from N(0, 1), as PEFT and loralib do.
    """
    if isinstance(layer, LoRAEmbedding):
        zero, drawn = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        zero, drawn = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    nn.init.zeros_(zero)
    if not drawn.is_meta:
        drawn.copy_(_drawn(layer, drawn.shape, config, generator))
    if isinstance(layer, LoRALayer):
        layer.updates[adapter].start()


def _drawn(
    layer: LoRALayer | LoRAEmbedding, shape: torch.Size, config: LoraConfig, generator: torch.Generator
) -> Tensor:
    values = torch.empty(shape, dtype=torch.float32)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(values, std=1 / min(shape), generator=generator)
    elif isinstance(layer, LoRAEmbedding):
        nn.init.normal_(values, generator=generator)
    else:
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values
