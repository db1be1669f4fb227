"""Starts that are computed from more than the layer. Beside PEFT: tests/peft/test_starts.py, training/test_loftq.py."""

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.given_start import start_from_directions
from lorasmith.lora.inject import inject
from tests.support.families import logits_of, tiny_base

PATHS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]


def test_each_layer_gets_its_directions_and_their_rank() -> None:
    base, config = tiny_base("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
    before = logits_of(base)
    base.adapters["default"] = inject(base.model, config, base.router)
    directions = {path: torch.randn(rank, 32) for path, rank in zip(PATHS, (4, 6, 0), strict=False)}
    changed = start_from_directions(base.model, "default", config, directions, keep_scaling=True)
    assert changed["target_modules"] == {PATHS[0], PATHS[1], PATHS[3]}
    assert (changed["rank_pattern"], changed["alpha_pattern"]) == ({PATHS[1]: 6}, {PATHS[1]: 12})
    for path in PATHS[:2]:
        update = base.model.get_submodule(path).updates["default"]
        assert torch.equal(update.own_matrices[0], directions[path].to(update.own_matrices[0]))
        assert update.scaling == 2
    assert not hasattr(base.model.get_submodule(PATHS[2]), "base_layer")
    assert torch.equal(logits_of(base), before)


def test_directions_of_other_layers_change_nothing() -> None:
    base, config = tiny_base("llama"), LoraConfig(r=4, target_modules=("q_proj",))
    inject(base.model, config, base.router)
    own = base.model.get_submodule(PATHS[0]).updates["default"].own_matrices[0].clone()
    with pytest.raises(ConfigError, match=r"eva_state_dict: model\.layers\.0\.self_attn\.v_proj do not belong"):
        start_from_directions(base.model, "default", config, dict.fromkeys(PATHS[:2], torch.ones(4, 32)), True)
    assert torch.equal(base.model.get_submodule(PATHS[0]).updates["default"].own_matrices[0], own)
