"""The update of full fine-tuning as LoRA: what all linear layers gained, W - W0, cut to a rank.

    s B A = the r largest singular values of W - W0 and their vectors        (Eckart and Young 1936)

They come from a randomized decomposition (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), which costs about
as much as a forward pass of a thousand tokens, so it is affordable where the losses of examples are.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _
from lorasmith.lora.adapted import linear_layers
from lorasmith.lora.inject import Adapter, inject, remove
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.merge import is_transposed
from lorasmith.lora.quantized import plain_weight
from lorasmith.lora.router import Router
from lorasmith.lora.spectrum import LayerSpectrum

EXACT = 256  # up to this many rows or columns, the whole decomposition is as fast
OVERSAMPLING, PASSES = 64, 4  # of the randomized one; then its values are within 2%, even where all are alike


def add_empty(model: PreTrainedModel, router: Router, name: str, rank: int) -> Adapter:
    """A new adapter of this rank on all linear layers, with the scaling 1, for `fill`.

    Raises ConfigError if the model has no linear layers, or experts, whose weights are no linear layers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rank larger than a layer: its rows are zero then
        adapter = inject(model, LoraConfig(r=rank, lora_alpha=rank), router, name, start=False, any_rank=True)
    if adapter.targets.parameters:
        remove(model, name)
        raise ConfigError(_("the model has experts, whose update cannot be cut to a rank here"))
    return adapter


@torch.no_grad()
def fill(model: PreTrainedModel, trained: nn.Module, name: str) -> Iterator[LayerSpectrum]:
    """Let each layer of the adapter `name` change W0 into W as far as its rank allows; yields its spectrum.

    trained: the model with the weights W, without adapters. Computed in float32, or in float64 for a float64 model.
    """
    for path, layer in linear_layers(model, name).items():
        A, B = layer.updates[name].own_matrices
        dW_OI = _difference(layer, trained.get_submodule(path)).to(A.dtype)
        U_OK, values_K, V_IK = _largest(dW_OI, len(A))
        count, root_K = len(values_K), values_K.sqrt()
        A.zero_()
        B.zero_()
        A[:count], B[:, :count] = (V_IK * root_K).t(), U_OK * root_K
        values_K = values_K.double().cpu()
        rest = float(dW_OI.double().square().sum()) - float(values_K.square().sum())
        yield LayerSpectrum(path, values_K[None], rest=max(rest, 0.0) if count < min(dW_OI.shape) else 0.0)


@torch.no_grad()
def cut(model: nn.Module, name: str, rank: int) -> None:
    """Leave only the largest singular values of each layer of an adapter that `fill` filled."""
    for layer in linear_layers(model, name).values():
        A, B = layer.updates[name].own_matrices
        A[rank:], B[:, rank:] = 0, 0


@torch.no_grad()
def replace_weights(model: nn.Module, trained: nn.Module, name: str) -> None:
    """Give the layers of the adapter `name` the whole weights W, so that without the adapter they have the update."""
    for path, layer in linear_layers(model, name).items():
        weight: Tensor = trained.get_submodule(path).weight  # type: ignore[assignment]
        layer.weight.copy_(weight)


def _difference(layer: LoRALayer, trained: nn.Module) -> Tensor:
    """W - W0 [O, I]."""
    before = plain_weight(layer.base_layer, torch.float64 if layer.weight.dtype == torch.float64 else torch.float32)
    after: Tensor = trained.weight  # type: ignore[assignment]
    difference = after.detach().to(before) - before
    return difference.t() if is_transposed(layer.base_layer) else difference


def _largest(dW_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, K], the singular values [K] in descending order and V [I, K]; K is the rank or less in a smaller layer."""
    if min(dW_OI.shape) <= max(EXACT, rank + OVERSAMPLING):
        U, S, Vh = torch.linalg.svd(dW_OI, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].t()
    with torch.random.fork_rng([dW_OI.device] if dW_OI.device.type == "cuda" else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(dW_OI, rank + OVERSAMPLING, niter=PASSES)
    return U[:, :rank], S[:rank], V[:, :rank]
