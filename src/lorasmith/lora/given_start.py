"""Starts of A and B that are computed from more than the layer: from its inputs (EVA), or the weights before rounding.

EVA (arXiv:2410.07170)     A = the main directions of the layer's inputs, as many as the layer is given
LoftQ (arXiv:2310.08659)   s B A = the best approximation of W - Q of rank R, where Q is the quantized W

I = in_features, O = out_features, R = rank, K = the directions in which there is an error, at most R
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, listed
from lorasmith.lora.adapted import linear_layers
from lorasmith.lora.init import initialize
from lorasmith.lora.inject import remove_at
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.quantized import is_quantized, plain_weight, weight_device
from lorasmith.lora.ranks import rank_and_alpha
from lorasmith.lora.start_values import start_of_error


@torch.no_grad()
def start_from_directions(
    model: PreTrainedModel, name: str, config: LoraConfig, directions: Mapping[str, Tensor], keep_scaling: bool
) -> dict[str, Any]:
    """Set A of the new adapter `name` to these directions [R, I] of each layer, which then has the rank R.

    A layer that is given no directions loses the adapter; one that is missing starts at random with its own rank.
    keep_scaling: lora_alpha grows with the rank. Returns the options that name the layers and their ranks.

    Raises ConfigError that names the directions which no layer has inputs for; nothing is then changed.
    """
    layers = linear_layers(model, name)
    _refuse_strangers(layers, directions)
    ranks: dict[str, tuple[int, float]] = {}
    for path, layer in layers.items():
        r, alpha = rank_and_alpha(config, path)
        new = len(directions[path]) if path in directions else r
        if not new:
            remove_at(model, path, layer, name)
            continue
        alpha = alpha * new / r if keep_scaling else alpha
        _resize(layer, name, config, new, alpha)
        if path in directions:
            layer.updates[name].own_matrices[0].copy_(directions[path])
        ranks[path] = new, alpha
    return {
        "target_modules": set(ranks),
        "rank_pattern": {path: r for path, (r, _alpha) in ranks.items() if r != config.r},
        "alpha_pattern": {path: alpha for path, (_r, alpha) in ranks.items() if alpha != config.lora_alpha},
    }


def _resize(layer: LoRALayer, name: str, config: LoraConfig, r: int, alpha: float) -> None:
    """Give the adapter new A and B of this rank in the layer, in their dtype, unless they have it already."""
    A, _B = layer.updates[name].own_matrices
    if len(A) == r and not A.is_meta:
        return
    variant = type(layer.updates[name])
    layer.add(name, r, config.scaling(r, alpha), config.lora_dropout, weight_device(layer.base_layer), variant)
    for p in layer.updates[name].parameters.values():
        p.data = p.data.to(A.dtype)
    initialize(layer, name, config, None)
    layer.train(layer.base_layer.training)


def _refuse_strangers(layers: Mapping[str, LoRALayer], directions: Mapping[str, Tensor]) -> None:
    strangers = [
        path
        for path, given in directions.items()
        if path not in layers or tuple(given.shape[1:]) != (layers[path].in_features,)
    ]
    if strangers:
        raise ConfigError(
            _(
                "eva_state_dict: {paths} do not belong to a linear layer of the adapter with as many inputs. Compute "
                "it for this model with get_eva_state_dict.",
                paths=listed(strangers),
            )
        )


@torch.no_grad()
def start_from_error(layer: LoRALayer, name: str, W_OI: Tensor) -> None:
    """Set the first K rows of A and columns of B from the error in the quantized weight of `layer`.

    The others stay as in the default start. W_OI: the weight before it was quantized.
    """
    update = layer.updates[name]
    A, B = update.own_matrices
    stored = plain_weight(layer.base_layer, torch.float32)
    Q_OI = stored.t() if getattr(layer.base_layer, "transposed", False) else stored
    A_KI, B_OK = start_of_error(W_OI.to(A.device) - Q_OI, len(A), update.scaling)
    A[: len(A_KI)].copy_(A_KI)
    B[:, : len(A_KI)].copy_(B_OK)
    update.start()


@torch.no_grad()
def start_from_errors(
    model: nn.Module, name: str, weight_of: Callable[[str], Tensor], keep: Callable[[str], bool]
) -> list[str]:
    """Start the quantized layers of the adapter `name` from their errors, one after the other. Returns their paths.

    weight_of: the weight by its name, before it was quantized. keep: called with the path of each layer after it; if
    False, A and B are put back.
    """
    layers = {path: layer for path, layer in linear_layers(model, name).items() if is_quantized(layer.base_layer)}
    for path, layer in layers.items():
        update = layer.updates[name]
        before = {key: saved.clone() for key, saved in update.saved.items()}
        start_from_error(layer, name, weight_of(f"{path}.weight"))
        if not keep(path):
            update.restore(before)
    return list(layers)
