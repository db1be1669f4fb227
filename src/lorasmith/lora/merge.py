"""Merging an adapter into new weights; the model itself is not modified.

W' = W + (lora_alpha / r) B A        (LoRA, arXiv:2106.09685, section 4.1, "No Additional Inference Latency")
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.inject import Adapter, adapters_of
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer, SavedModule, registered_update
from lorasmith.lora.parameters import LoRAParameters
from lorasmith.lora.quantized import is_quantized, plain_weight
from lorasmith.lora.token_rows import TokenRows


@torch.no_grad()
def merged_weight(layer: LoRALayer | LoRAEmbedding, *adapters: str) -> Tensor:
    """The weight of `layer` with these adapters merged into it: float64, in the base weight's shape, on its device.

    Raises AdapterError if an adapter uses an unregistered variant.
    """
    W = plain_weight(layer.base_layer, torch.float32 if is_quantized(layer.base_layer) else torch.float64).double()
    if isinstance(layer, LoRAEmbedding):
        for adapter in adapters:
            A_RV, B_OR = layer.lora_embedding_A[adapter].double(), layer.lora_embedding_B[adapter].double()
            W = W + (B_OR @ A_RV).t() * layer.scaling[adapter]
        return W
    transposed = is_transposed(layer.base_layer)
    W = W.t() if transposed else W
    for adapter in adapters:
        W = registered_update(layer, adapter).merged(W)
    return W.t().contiguous() if transposed else W


@torch.no_grad()
def merged_parameters(
    layer: LoRALayer | LoRAEmbedding | LoRAParameters, *adapters: str
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the base layer that these adapters change, by their names in it, in float64."""
    if isinstance(layer, LoRAParameters):
        for name in dict.fromkeys(name for adapter in adapters for name in layer.updates[adapter]):
            W = layer.base_layer.get_parameter(name).double()
            for adapter in adapters:
                W = layer.updates[adapter][name].merged(W) if name in layer.updates[adapter] else W
            yield name, W
        return
    yield "weight", merged_weight(layer, *adapters)
    if isinstance(layer, LoRALayer) and (bias := _changed_bias(layer, adapters)) is not None:
        yield "bias", bias


def _changed_bias(layer: LoRALayer, adapters: Sequence[str]) -> Tensor | None:
    """The bias with these adapters merged into it; None if that does not change it."""
    bias: Tensor | None = layer.base_layer.bias  # type: ignore[assignment]
    own = merged = None if bias is None else bias.double()
    for adapter in adapters:
        merged = layer.updates[adapter].merged_bias(merged)
    return None if merged is own else merged


@torch.no_grad()
def merge_into(model: nn.Module, names: Sequence[str], keep: bool, check: bool) -> dict[str, Tensor]:
    """Add these adapters to the weights of `model` itself, in float64. Returns the changed weights as they were.

    keep: copy the weights, to return them by their names; otherwise the result is empty. check: compute everything
    twice, first without a change, and raise ValueError if the result has NaN or infinity.

    Raises AdapterError if an update is equivalent to no weights; with `check`, the model is then unchanged.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoRALayer | LoRAEmbedding | LoRAParameters)}
    own = {path: [name for name in names if name in adapters_of(layer)] for path, layer in layers.items()}
    for layer, name in [(layers[path], name) for path in layers for name in own[path]] if check else ():
        if not all(p.isfinite().all() for _name, p in merged_parameters(layer, name)):  # the message is PEFT's
            text = _("NaNs detected in the merged weights. The adapter {name} seems to be broken.", name=name)
            raise ValueError(text)
    before: dict[str, Tensor] = {}
    for path, layer in layers.items():
        for name, merged in merged_parameters(layer, *own[path]) if own[path] else ():
            p = layer.base_layer.get_parameter(name)
            if keep:
                before[f"{path}.base_layer.{name}"] = p.detach().clone()
            p.data.copy_(merged)
    return before


def merge_more(
    model: nn.Module, saved: dict[str, Tensor], merged: Sequence[str], names: Sequence[str], keep: bool, check: bool
) -> dict[str, Tensor]:
    """Merge `names` besides the adapters `merged`, all of them into the weights as they were, which are in `saved`.

    Returns these weights. Raises what `merge_into` raises; the adapters `merged` are then merged as before.
    """
    restore_weights(model, saved)
    try:
        return merge_into(model, [*merged, *names], keep, check)
    except (ValueError, AdapterError):
        saved.update(merge_into(model, merged, True, False))
        raise


def restore_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Give the model the weights in `saved` again, bit for bit, and empty it."""
    for path, weight in saved.items():
        model.get_parameter(path).data.copy_(weight)
    saved.clear()


@torch.no_grad()
def merged_weights(model: PreTrainedModel, adapter: Adapter, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The weights that the adapter changes, by their names in the base model.

    These are W + B A, fully trained modules, weights with trained rows, and trained biases. Each is computed in
    float64 and then rounded to `dtype`, one at a time to save memory.

    Raises AdapterError if a base weight is quantized, since rounding would lose the update.
    """
    mine = {id(p) for p in adapter.parameters.values()}
    named = ((plain_name(name), p) for name, p in model.named_parameters() if id(p) in mine)
    weights = {name: p.to(dtype) for name, p in named if name is not None}  # biases, which are trained in place
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer | LoRAEmbedding) and adapter.name in adapters_of(module):
            _refuse_quantized(path, module.base_layer)
            weights |= {f"{path}.{name}": p.to(dtype) for name, p in merged_parameters(module, adapter.name)}
        elif isinstance(module, LoRAParameters) and adapter.name in adapters_of(module):
            weights |= {f"{path}.{name}": p.to(dtype) for name, p in merged_parameters(module, adapter.name)}
        elif isinstance(module, SavedModule) and adapter.name in module.modules_to_save:
            copy = module.modules_to_save[adapter.name]
            if isinstance(copy, TokenRows):
                weights[f"{path}.weight"] = copy.merged(module.original_module).to(dtype)
                continue
            weights |= {f"{path}.{name}": p.to(dtype) for name, p in copy.named_parameters()}
    return weights


def plain_name(name: str) -> str | None:
    """The name of a parameter in the base model without adapters; None if it belongs to an adapter."""
    if ".lora_" in name or ".modules_to_save." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored as [in, out]."""
    return isinstance(layer, Conv1D) or getattr(layer, "transposed", False)


def _refuse_quantized(path: str, layer: nn.Module) -> None:
    if is_quantized(layer):
        return
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if not weight.dtype.is_floating_point:
        raise AdapterError(
            _(
                "{path}: the base model is quantized ({kind}), so merging would round the update away. Load a "
                "base model that is not quantized.",
                path=path,
                kind=type(layer).__name__,
            )
        )
