"""Adapters of transformers 4, in which each expert was a module with its own A and B, as adapters of one parameter.

    gate_up_proj: A = [A_gate; A_up], B = [[B_gate, 0], [0, B_up]]        so B A is both updates, one below the other

PEFT 0.19 and later read such adapters in the same way. Routers, which were linear layers then, are parameters now too.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import PEFT_PREFIX, unwrapped
from lorasmith.lora.parameters import peft_prefixes
from lorasmith.lora.ranks import rank_and_alpha
from lorasmith.lora.target import is_adaptable
from lorasmith.lora.target_parameters import expert_parameters

_PAIR = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
_EMBEDDING = ".lora_embedding_A"
# the parts of a parameter, from its first row on, by the names that Mixtral and all others had for them
_PARTS = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}


class _Pair(NamedTuple):
    """A [r, I] and B [O, r] of one module, with its scaling."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float


def in_parameters(
    model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of an adapter as this model needs them. Others than those of transformers 4 are unchanged.

    Pairs that this model has no place for stay as they are, so that they are refused by their names.
    """
    if config.target_parameters:
        return config, dict(tensors)
    with unwrapped(model):
        modules = dict(model.named_modules())
    pairs = _pairs(config, tensors, modules)
    stacks = {path: module for path, module in modules.items() if expert_parameters(module)}
    own = {path: found for path, module in stacks.items() if (found := _of_stack(path, module, pairs))}
    routers = {path: pair for path, pair in pairs.items() if path in modules and _is_router(modules[path])}
    if not own and not routers:
        return config, dict(tensors)
    kept = [path for path in pairs if path in modules and path not in routers]
    kept += [key.removeprefix(PEFT_PREFIX).removesuffix(_EMBEDDING) for key in tensors if key.endswith(_EMBEDDING)]
    others = {key: t for key, t in tensors.items() if not key.endswith((".lora_A.weight", ".lora_B.weight"))}
    named = {path: [name for name in expert_parameters(stacks[path]) if name in parts] for path, parts in own.items()}
    placed = {path: (f"{path}.weight", pair) for path, pair in routers.items()}
    for path, names in named.items():
        for name, prefix in peft_prefixes(names).items():
            placed[f"{path}.{prefix}".rstrip(".")] = (f"{path}.{name}", own[path][name])
    ranks = {path: len(pair.A_RI) // _experts(modules, path) for path, pair in placed.values()}
    alphas = {path: pair.scaling / config.scaling(ranks[path], 1.0) for path, pair in placed.values()}
    fitted = config.model_copy(
        update={
            "target_modules": tuple(kept),
            "target_parameters": tuple(ranks),
            "rank_pattern": {re.escape(path): r for path, r in ranks.items()} | config.rank_pattern,
            "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items()} | config.alpha_pattern,
        }
    )
    left = {path: pair for path, pair in pairs.items() if path in kept} | {
        path: pair for path, (_name, pair) in placed.items()
    }
    left |= {path: pair for path, pair in pairs.items() if path not in modules and not _is_in(path, own)}
    return fitted, others | {
        f"{PEFT_PREFIX}{path}.lora_{matrix}.weight": tensor
        for path, pair in left.items()
        for matrix, tensor in (("A", pair.A_RI), ("B", pair.B_OR))
    }


def _pairs(config: LoraConfig, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, _Pair]:
    """The A and B of each module, by its path in this version of transformers."""
    found = {}
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        path, other = key.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight"), key.replace(".lora_A.", ".lora_B.")
        if other in tensors:
            now = path.replace(".block_sparse_moe.", ".mlp.")  # as Mixtral and others called it
            is_old = path not in modules and (now in modules or now.partition(".experts.")[0] in modules)
            found[now if is_old else path] = _Pair(
                tensors[key], tensors[other], config.scaling(*rank_and_alpha(config, path))
            )
    return found


def _of_stack(path: str, module: nn.Module, pairs: Mapping[str, _Pair]) -> dict[str, _Pair]:
    """A [E*R, I], B [O, R*E] and scaling of each parameter of the experts at `path`, if all experts have pairs."""
    given = {(int(m[2]), m[3]): pair for p, pair in pairs.items() if (m := _PAIR.fullmatch(p)) and m[1] == path}
    found = {}
    known = [name for name in expert_parameters(module) if name in _PARTS]
    for name in [] if getattr(module, "is_transposed", False) else known:
        E, O, _I = module.get_parameter(name).shape
        height = O // len(_PARTS[name])
        parts = [(i, key) for i, keys in enumerate(_PARTS[name]) for key in keys if (0, key) in given]
        if not parts or any((e, key) not in given for e in range(E) for _i, key in parts):
            continue
        first = given[0, parts[0][1]]
        r = sum(len(given[0, key].A_RI) for _i, key in parts)
        A_ERI = torch.stack([torch.cat([given[e, key].A_RI for _i, key in parts]) for e in range(E)])
        B_EOR = A_ERI.new_zeros(E, O, r)
        for e in range(E):
            column = 0
            for i, key in parts:
                pair = given[e, key]
                at = B_EOR[e, i * height : (i + 1) * height, column : column + len(pair.A_RI)]
                at.copy_(pair.B_OR * (pair.scaling / first.scaling))
                column += len(pair.A_RI)
        found[name] = _Pair(A_ERI.flatten(0, 1), B_EOR.permute(1, 2, 0).reshape(O, -1), first.scaling)
    return found


def _is_router(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and not is_adaptable(module)


def _is_in(path: str, stacks: Mapping[str, dict[str, _Pair]]) -> bool:
    """Whether the pair at `path` became part of a parameter."""
    found = _PAIR.fullmatch(path)
    parts = {key for name in stacks.get(found[1], {}) for keys in _PARTS[name] for key in keys} if found else set()
    return found is not None and found[3] in parts


def _experts(modules: Mapping[str, nn.Module], path: str) -> int:
    """The number of experts of the parameter at `path`; 1 if it has two dimensions."""
    module, _dot, name = path.rpartition(".")
    parameter = modules[module].get_parameter(name)
    return len(parameter) if parameter.dim() == 3 else 1
