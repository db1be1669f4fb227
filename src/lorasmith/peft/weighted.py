"""add_weighted_adapter: a new adapter from a weighted sum of others in the model."""

from dataclasses import replace
from typing import Any

import torch

from lorasmith.errors import LorasmithError
from lorasmith.lora.adapted import layers_of
from lorasmith.lora.combine import combine
from lorasmith.lora.factors import factors_in, largest_rank, set_factors


@torch.no_grad()
def add_weighted(
    tuner: Any, adapters: list[str], weights: list[float], adapter_name: str, method: str, svd_rank: int | None,
    density: float | None, majority_sign_method: str,
) -> None:  # fmt: skip
    """Add `adapter_name`, combined as PEFT's combination_type `method` says; see lorasmith.lora.combine.

    Raises AdapterError for variants of LoRA, whose updates are no product of two matrices.
    """
    method, rank, targets = tuner._check_add_weighted_adapter(adapters, method, svd_rank)
    given = [factors_in(tuner.model, name) for name in adapters]
    rank = min(rank, largest_rank(given))
    changes = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config = replace(tuner.peft_config[adapters[0]], target_modules=targets, **changes)
    config.from_file = True  # it may exclude what only another of the adapters has
    tuner.peft_config[adapter_name], pairs = config, list(zip(given, weights, strict=True))
    try:
        tuner.inject_adapter(tuner.model, adapter_name)  # first, so that the masks of dare are those of PEFT
        found = combine(pairs, method, rank=rank, density=density, majority_sign_method=majority_sign_method,
                        order=dict(layers_of(tuner.model)))  # fmt: skip
        set_factors(tuner.model, adapter_name, dict(found), rank)
    except LorasmithError:
        tuner.delete_adapter(adapter_name)
        raise
    tuner.set_requires_grad(adapter_name, False)
