"""Held adapters: kept in memory for serving, outside the model, until a request needs them in the adapter bank."""

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.files import ADAPTER_WEIGHTS, mismatches, refuse_expert_pairs
from lorasmith.lora.fused.bank import AdapterWeights, Factors
from lorasmith.lora.inject import PEFT_PREFIX, Adapter, inject, unwrapped
from lorasmith.lora.ranks import rank_and_alpha
from lorasmith.lora.router import Router
from lorasmith.lora.target import find_targets
from lorasmith.lora.token_rows import ROWS
from lorasmith.lora.update import Update
from lorasmith.lora.variant import variant_of


def held_weights(
    model: PreTrainedModel,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    paths: Collection[str],
    version: Hashable,
) -> AdapterWeights | None:
    """The weights of an adapter that was read from `folder`, for the adapter bank.

    None if the adapter changes anything besides the linear layers at `paths`, such as experts, or is a variant of LoRA.
    `version` identifies the content; `tensors` has PEFT's keys and the base model's dtype.

    Raises AdapterError if keys are missing or unknown, or shapes are wrong.
    """
    with unwrapped(model):
        refuse_expert_pairs(model, tensors, folder)
        targets = find_targets(model, config, strict=False)
        layers = dict(model.named_modules())
    is_low_rank = variant_of(config) is Update
    has_rows = any(key.endswith(ROWS) for key in tensors)
    others = targets.saved or targets.parameters or has_rows
    if others or config.bias != "none" or not is_low_rank or not set(targets.adapted) <= set(paths):
        return None
    wanted: dict[str, Tensor] = {}
    for path in targets.adapted:
        O, I = layers[path].out_features, layers[path].in_features
        r, _alpha = rank_and_alpha(config, path)
        wanted |= {_key(path, "A"): torch.empty(r, I, device="meta"), _key(path, "B"): torch.empty(O, r, device="meta")}
    if problems := mismatches(wanted, tensors):
        raise AdapterError(*(f"{folder / ADAPTER_WEIGHTS}: {problem}" for problem in problems))
    changes = _changes(config, targets.adapted, tensors)
    return AdapterWeights(lambda: changes, max(len(change.A_RI) for change in changes.values()), lambda: version)


@torch.no_grad()
def inject_held(model: PreTrainedModel, router: Router, name: str, weights: AdapterWeights) -> Adapter:
    """Add a held adapter to the model, for layers that are not in the bank anymore. The router's `active` is kept.

    Raises AdapterError if another adapter trains one of its layers in full.
    """
    factors, active = weights.read(), router.active
    ranks = {re.escape(path): len(A_RI) for path, (A_RI, _B_RO) in factors.items()}
    alphas = {path: float(r) for path, r in ranks.items()}  # B is already scaled
    config = LoraConfig(r=weights.r, target_modules=tuple(factors), rank_pattern=ranks, alpha_pattern=alphas)
    adapter = inject(model, config, router, name, strict=False)
    router.active = active
    for path, (A_RI, B_RO) in factors.items():
        A, B = model.get_submodule(path).updates[name].own_matrices  # type: ignore[union-attr, index]
        A.copy_(A_RI)
        B.copy_(B_RO.t())
    return adapter


def _key(path: str, matrix: str) -> str:
    return f"{PEFT_PREFIX}{path}.lora_{matrix}.weight"


def _changes(config: LoraConfig, paths: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors by layer, in a single allocation: hundreds of small ones would take up to a quarter more memory."""
    pairs = [(tensors[_key(path, "A")], tensors[_key(path, "B")]) for path in paths]
    sizes = [matrix.numel() for pair in pairs for matrix in pair]
    parts = iter(pairs[0][0].new_empty(sum(sizes)).split(sizes))
    changes = {}
    for path, (A_RI, B_OR) in zip(paths, pairs, strict=True):
        change = Factors(next(parts).view(A_RI.shape), next(parts).view(B_OR.shape[::-1]))
        change.A_RI.copy_(A_RI)
        torch.mul(B_OR.t(), config.scaling(*rank_and_alpha(config, path)), out=change.B_RO)
        changes[path] = change
    return changes
