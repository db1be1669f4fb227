"""Frozen layers with quantized weights, and what the rest needs to know of such layers, those of bitsandbytes included.

bitsandbytes' own layers are used only where a model comes with them. Without gradients, its Linear4bit repacks its
weight in place for a faster kernel, after which its backward pass fails.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.lora.quantized_weight import FourBitWeight, Int8Weight, QuantizedWeight


class QuantizedLinear(nn.Linear):
    """y = W x + b with a quantized W. `transposed`: it stands in for a Conv1D, which stores W^T."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None, transposed: bool = False) -> None:
        nn.Module.__init__(self)  # that of Linear would allocate the weight
        self.quantized, self.transposed = quantized, transposed
        self.out_features, self.in_features = quantized.shape
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [O, I] in the dtype of computation, computed anew: for code that reads it instead of calling the layer."""
        return self.quantized.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        y: Tensor = _QuantizedProduct.apply(x, self.quantized)  # type: ignore[no-untyped-call]
        bias: Tensor | None = self.bias
        return y if bias is None else y + bias.to(y.dtype)


class QuantizedEmbedding(nn.Embedding):
    """Rows of a quantized matrix [V, H]."""

    def __init__(self, quantized: QuantizedWeight, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.quantized, self.padding_idx = quantized, padding_idx
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix in the dtype of computation, computed anew."""
        return self.quantized.dequantized()

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        return self.quantized.at(ids)


class _QuantizedProduct(torch.autograd.Function):
    """x W^T for a quantized W. Saves nothing: W is converted again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """x [..., I] -> [..., O]."""
        ctx.weight = weight
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # no view: LoRA adds to it in place
        weight.product(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx_TI = ctx.weight.add_product(dy_TO, dy_TO.new_zeros(len(dy_TO), ctx.weight.shape[1]))
        return dx_TI.view(*dy.shape[:-1], -1), None


Quantized = QuantizedLinear | QuantizedEmbedding
_BITSANDBYTES = ("Params4bit", "Int8Params")  # the classes of its quantized parameters


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's own weight is quantized, here or by a layer of bitsandbytes."""
    return isinstance(module, Quantized) or _is_bitsandbytes(module)


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module._parameters.get("weight")).__name__ in _BITSANDBYTES


@torch.no_grad()
def plain_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The module's weight in `dtype`, as the module stores it but not quantized."""
    if isinstance(module, Quantized):
        weight = module.quantized.dequantized(dtype)
        return weight.t() if getattr(module, "transposed", False) else weight
    if _is_bitsandbytes(module):
        return weight_of_bitsandbytes(module, torch.float32).dequantized(dtype)
    own: Tensor = module.weight  # type: ignore[assignment]
    return own.to(dtype)


def weight_of_bitsandbytes(module: Any, dtype: torch.dtype) -> QuantizedWeight:
    """The weight of a Linear4bit or Linear8bitLt, in the same memory."""
    if type(module.weight).__name__ == "Params4bit":
        return FourBitWeight(module.weight.data, module.weight.quant_state, dtype)
    SCB = getattr(module.weight, "SCB", None)
    return Int8Weight(module.weight.data, module.state.SCB if SCB is None else SCB, dtype)


def stored_weight(module: nn.Module) -> Tensor | QuantizedWeight:
    """What an embedding or head stores, the same object if they are tied."""
    return module.quantized if isinstance(module, Quantized) else module.weight  # type: ignore[return-value]


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of an embedding's or a head's weight."""
    return tuple(stored_weight(module).shape)


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which the module computes: that of its first parameter, quantized ones included."""
    for part in module.modules():
        if isinstance(part, Quantized):
            return part.quantized.dtype
        if (own := next(part.parameters(recurse=False), None)) is not None:
            return own.dtype
    raise StopIteration


def weight_device(module: nn.Module) -> torch.device:
    """The device of the module's weights."""
    return next(t for part in module.modules() for t in (*part.parameters(False), *part.buffers(False))).device


def unquantized(module: nn.Module) -> nn.Module:
    """The module with ordinary layers in place of its quantized ones, with the same values. Changes a larger module."""
    if isinstance(module, QuantizedEmbedding):
        with torch.device("meta"):
            rows = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        rows.weight = nn.Parameter(module.weight, requires_grad=False)
        return rows.train(module.training)
    if isinstance(module, QuantizedLinear):
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight, plain.bias = nn.Parameter(module.weight, requires_grad=False), module.bias
        return plain.train(module.training)
    for path, part in list(module.named_modules()):
        if isinstance(part, Quantized):
            module.set_submodule(path, unquantized(part))
    return module


@torch.no_grad()
def unquantize_ends(model: Any) -> None:
    """Give a model an ordinary embedding and head in place of quantized ones, to resize them; tied ones stay tied."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = all(isinstance(end, Quantized) for end in ends) and ends[0].quantized is ends[1].quantized
    plain = [unquantized(end) if isinstance(end, Quantized) else end for end in ends]
    if tied:
        plain[1].weight = plain[0].weight
    model.set_input_embeddings(plain[0])
    if ends[1] is not None:
        model.set_output_embeddings(plain[1])


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, including those that are quantized; shared ones count once."""
    quantized = {part for part in module.modules() if isinstance(part, QuantizedWeight)}
    plain = sum(_numbers(p) for p in module.parameters())
    return plain + sum(part.shape.numel() for part in quantized)


def stored_bytes(module: nn.Module) -> int:
    """The size of all frozen weights as they are stored, in bytes; shared ones count once."""
    quantized = {part for part in module.modules() if isinstance(part, QuantizedWeight)}
    tensors = [*(p for p in module.parameters() if not p.requires_grad), *(b for q in quantized for b in q.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


def _numbers(p: nn.Parameter) -> int:
    state = getattr(p, "quant_state", None)
    return p.numel() if state is None else int(torch.Size(state.shape).numel())


def keep_layout(module: nn.Module) -> None:
    """Forbid a Linear4bit of bitsandbytes to repack its weight, after which it cannot compute a backward pass."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
