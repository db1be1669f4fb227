"""The tensors of an adapter as they are saved, and its values from such tensors.

They differ from its parameters only for a variant that is saved as plain LoRA; see `Update.saved`.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.lora.inject import PEFT_PREFIX, Adapter
from lorasmith.lora.layer import LoRALayer, registered_update
from lorasmith.lora.update import Update


def saved_values(adapter: Adapter, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors to save, by PEFT's keys. Raises AdapterError if a layer uses an unregistered variant."""
    tensors = {key: p.detach() for key, p in adapter.parameters.items()}
    for prefix, update in _updates(adapter, model):
        tensors |= {prefix + part: tensor for part, tensor in update.saved.items()}
    return tensors


@torch.no_grad()
def restore_values(adapter: Adapter, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapter the values of `tensors`, which `saved_values` made.

    A layer that is not among them, such as one that the training left out, gets zeros. So does one with another rank:
    the caller compares the options.
    """
    parameters = dict(adapter.parameters)
    for prefix, update in _updates(adapter, model):
        own = {part: tensors[prefix + part] for part in update.parameters if prefix + part in tensors}
        for part, p in update.parameters.items():
            del parameters[prefix + part]
            p.zero_()
        update.start()
        if all(part in own and own[part].shape == saved.shape for part, saved in update.saved.items()):
            update.restore(own)
    for key, parameter in parameters.items():
        if key in tensors and tensors[key].shape == parameter.shape:
            parameter.copy_(tensors[key])


def _updates(adapter: Adapter, model: PreTrainedModel) -> Iterator[tuple[str, Update]]:
    """The updates of its linear layers, with the beginning of their keys."""
    for path in adapter.targets.adapted:
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALayer):
            yield f"{PEFT_PREFIX}{path}.", registered_update(layer, adapter.name)


def has_moved(adapter: Adapter, model: PreTrainedModel) -> bool:
    """Whether the adapter changes the model: an update has moved, or something else is trained."""
    updates = [update for _prefix, update in _updates(adapter, model)]
    if any(update.has_moved for update in updates):
        return True
    own = {id(p) for update in updates for p in update.parameters.values()}
    others = {key: p for key, p in adapter.parameters.items() if id(p) not in own}
    return has_effect(others)


def has_effect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's tensors, by PEFT's keys, change the model: A and B are nonzero, or a full module is trained.

    Other parameters of a variant are ignored, since they do not start at zero.
    """
    pairs = [(key, key.replace("lora_B.", "lora_A.")) for key in tensors if ".lora_B." in key]
    pairs += [(key, key[:-1] + "B") for key in tensors if key.endswith("lora_embedding_A")]
    if any(key for key in tensors if ".lora_" not in key):
        return True  # a fully trained module, or a bias
    sizes = ([float(tensors[key].detach().float().abs().sum()) for key in pair if key in tensors] for pair in pairs)
    return any(all(math.isfinite(size) and size > 0 for size in pair) for pair in sizes)
