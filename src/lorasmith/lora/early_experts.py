"""Adapters of experts as PEFT 0.17 and 0.18 stored them, which took every stack [E, O, I] for one of [E, I, O].

    then   W_EOI += (B A)^T    A [E*R, O], B [I, R*E]
    now    W_EOI += B A        A [E*R, I], B [O, R*E]

So A and B change places. Stacks that a module marks as transposed, W_EIO, are stored in one way by all versions.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.i18n import _
from lorasmith.lora.inject import parameter_keys, unwrapped
from lorasmith.lora.target import find_targets

_A, _B = "lora_A.weight", "lora_B.weight"


def stored_transposed(peft_config: Mapping[str, Any], is_ours: bool) -> bool | None:
    """Whether experts are stored as by PEFT 0.17 and 0.18; None if the version does not tell. is_ours: by lorasmith."""
    text = str(peft_config.get("peft_version") or "")
    if version := re.match(r"(\d+)\.(\d+)", text):
        number = int(version[1]), int(version[2])
        return None if number == (0, 19) and "dev" in text else number < (0, 19)
    return False if is_ours else None  # PEFT 0.17 did not write its version


def as_stored_now(
    model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor], transposed: bool | None
) -> dict[str, Tensor]:
    """The tensors of an adapter as PEFT stores them since 0.19. transposed: as `stored_transposed` gives it.

    The shapes decide, and if all stacks are square, `transposed`. Raises AdapterError if nothing tells.
    """
    stacks = _stacks(model, config, tensors)
    told = [(shape, _features(tensors, key)) for key, (_path, shape) in stacks.items() if shape[1] != shape[2]]
    if (all(found == (O, I) for (_E, O, I), found in told)) if told else transposed:
        return dict(tensors) | {
            new: tensor for key, (_path, (E, _O, _I)) in stacks.items() for new, tensor in _swapped(tensors, key, E)
        }
    if stacks and not told and transposed is None:
        raise AdapterError(
            _(
                "PEFT 0.17 and 0.18 stored the matrices of experts transposed, and nothing tells whether they are so "
                "here: {path} is square, and adapter_config.json has no usable peft_version. Add the version of PEFT "
                'that trained the adapter to it, such as "peft_version": "0.18.1".',
                path=next(path for path, _shape in stacks.values()),
            )
        )
    return dict(tensors)


def _stacks(
    model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The path and shape [E, O, I] of each adapted stack by the start of its keys."""
    if not config.target_parameters:
        return {}
    with unwrapped(model):
        try:
            targets = find_targets(model, config, strict=False)
        except ConfigError:  # `load_adapter` reports it
            return {}
        found = {}
        for key, path in parameter_keys(targets).items():
            module, parameter = model.get_submodule(path.rpartition(".")[0]), model.get_parameter(path)
            start = key.removesuffix(_A)
            is_pair = key.endswith(_A) and {key, start + _B} <= tensors.keys()
            if is_pair and parameter.dim() == 3 and not getattr(module, "is_transposed", False):
                found[start] = path, tuple(parameter.shape)
    return found


def _features(tensors: Mapping[str, Tensor], start: str) -> tuple[int, int]:
    """The inner sides of A and B: (I, O) now, (O, I) then."""
    return tensors[start + _A].shape[1], tensors[start + _B].shape[0]


def _swapped(tensors: Mapping[str, Tensor], start: str, E: int) -> list[tuple[str, Tensor]]:
    """A and B of one stack of E experts, each made of the other one."""
    A, B = tensors[start + _A], tensors[start + _B]
    if len(A) % E or len(A) != B.shape[1]:
        return []  # `load_adapter` refuses the shapes
    A_ERO, B_IRE = A.reshape(E, -1, A.shape[1]), B.reshape(len(B), -1, E)
    return [
        (start + _A, B_IRE.permute(2, 1, 0).reshape(len(A), -1)),
        (start + _B, A_ERO.permute(2, 1, 0).reshape(A.shape[1], -1)),
    ]
