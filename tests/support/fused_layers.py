"""Three LoRA layers with one input, and the formula that they must give."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorasmith.lora.fused.linears import FusedLinears
from lorasmith.lora.layer import LoRALayer, plain_low_rank
from lorasmith.lora.router import Router

I, T = 6, 11
WIDTHS, RANKS, SCALES = (8, 4, 4), (2, 3, 1), (0.7, 1.5, 2.0)


def layers(
    bias: bool = False, adapters: Sequence[str] = ("a",), dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> list[LoRALayer]:
    """q, k and v of different widths and ranks, linked, B drawn too."""
    torch.manual_seed(0)
    router, made = Router(), []
    for width, r, s in zip(WIDTHS, RANKS, SCALES, strict=True):
        base = nn.Linear(I, width, bias=bias, dtype=dtype).requires_grad_(False)
        layer = LoRALayer(base, I, width, router)
        for i, name in enumerate(adapters):
            layer.add(name, r + i, s + i, dropout, torch.device("cpu"))
            nn.init.normal_(layer.lora_B[name].weight)
        made.append(layer)
    linked(made)
    router.active = adapters[0]
    return made


def linked(made: Sequence[LoRALayer]) -> FusedLinears:
    fused = FusedLinears(made[0].router, made)
    for layer in made:
        layer.fused_linears = fused
    return fused


def formula(made: Sequence[LoRALayer], x: Tensor, adapter: str = "a") -> list[Tensor]:
    """W x + b + s B A x of each layer, in plain torch."""
    bounds = ((0, x.numel() // x.shape[-1]),)
    return [
        plain_low_rank(one.base_layer(x), x, bounds, (update.scaling,), *update.matrices)
        for one, update in ((one, one.updates[adapter]) for one in made)
    ]


def trained(made: Sequence[LoRALayer], adapter: str = "a") -> list[Tensor]:
    return [matrix for one in made for matrix in one.updates[adapter].matrices]


def with_gradients(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of `inputs`."""
    loss = torch.stack([(o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs]).sum()
    return [*(o.detach() for o in outs), *torch.autograd.grad(loss, inputs)]


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (1, T)), I, dtype=dtype, requires_grad=True)
