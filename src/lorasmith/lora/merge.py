"""Merging as a pure function: new weights, the model untouched.

W' = W + (lora_alpha / r) B A        (arXiv:2106.09685, section 4.1, "No Additional Inference Latency")
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasmith.errors import AdapterError
from lorasmith.i18n import _
from lorasmith.lora.inject import Adapter
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer, SavedModule


@torch.no_grad()
def update(layer: LoRALayer | LoRAEmbedding, adapter: str) -> Tensor:
    """(lora_alpha / r) B A in the shape of the base's weight, in float64 on its device."""
    if isinstance(layer, LoRAEmbedding):
        A_RV, B_OR = layer.lora_embedding_A[adapter].double(), layer.lora_embedding_B[adapter].double()
        delta_VO: Tensor = (B_OR @ A_RV).t() * layer.scaling[adapter]
        return delta_VO
    A_RI, B_OR = (matrix.double() for matrix in layer.matrices(adapter))
    delta_OI = B_OR @ A_RI * layer.scaling[adapter]
    return delta_OI.t() if isinstance(layer.base_layer, Conv1D) else delta_OI


@torch.no_grad()
def merged_weights(model: PreTrainedModel, adapter: Adapter, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The weights that change, under the base's own names: W + B A, copies trained whole, trained biases.

    Each is summed in float64 and then rounded to `dtype`, so that only one is wide at a time.

    Raises:
        AdapterError: the base is quantised, so that W + B A would be rounded onto its few levels.
    """
    mine = {id(p) for p in adapter.parameters.values()}
    named = ((plain_name(name), p) for name, p in model.named_parameters() if id(p) in mine)
    weights = {name: p.to(dtype) for name, p in named if name is not None}  # biases are trained in the base itself
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer | LoRAEmbedding) and adapter.name in module.scaling:
            W: Tensor = module.base_layer.weight  # type: ignore[assignment]
            _refuse_quantised(path, module.base_layer, W)
            weights[f"{path}.weight"] = (W.double() + update(module, adapter.name)).to(dtype)
        elif isinstance(module, SavedModule) and adapter.name in module.modules_to_save:
            copy = module.modules_to_save[adapter.name]
            weights |= {f"{path}.{name}": p.to(dtype) for name, p in copy.named_parameters()}
    return weights


def plain_name(name: str) -> str | None:
    """A parameter's name as the base alone has it, or None where it belongs to an adapter."""
    if ".lora_" in name or ".modules_to_save." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _refuse_quantised(path: str, layer: nn.Module, weight: Tensor) -> None:
    if not weight.dtype.is_floating_point:
        raise AdapterError(
            _(
                "{path}: the base model is quantised ({kind}), so merging would round the update away. Load a "
                "base model that is not quantised.",
                path=path,
                kind=type(layer).__name__,
            )
        )
