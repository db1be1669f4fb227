"""Adapters that are held in memory outside of the model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.errors import AdapterError
from lorasmith.lora.fused.held import held_weights, inject_held
from lorasmith.lora.inject import Adapter
from lorasmith.model.base import Base
from tests.support.families import adapted, distance, logits_of, tiny_base

pytestmark = pytest.mark.usefixtures("exact")
FOLDER = Path("the/adapter")


def trained(**options: object) -> tuple[Base, Adapter, dict[str, Tensor]]:
    """A plain base, and an adapter that was trained on another with its tensors."""
    _other, adapter = adapted("llama", **options)
    return tiny_base("llama"), adapter, {key: p.detach() for key, p in adapter.parameters.items()}


def test_factors_are_the_files_matrices_with_the_scaling_in_b() -> None:
    base, adapter, tensors = trained(target_modules=("q_proj", "up_proj"), rank_pattern={"up_proj": 6}, lora_alpha=6)
    paths = adapter.targets.adapted
    weights = held_weights(base.model, adapter.config, tensors, FOLDER, paths, "v1")
    assert weights is not None
    assert (weights.r, weights.version(), set(weights.read())) == (6, "v1", set(paths))
    for path, (A, B) in weights.read().items():
        key = f"base_model.model.{path}.lora_{{}}.weight"
        assert torch.equal(A, tensors[key.format("A")])
        assert torch.equal(B, tensors[key.format("B")].t() * (6 / len(A)))
    assert len({A.untyped_storage().data_ptr() for A, _B in weights.read().values()}) == 1


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ("lm_head",)}, {"bias": "all"}, {"use_dora": True}, {"target_modules": ("k_proj",)}]
)
def test_what_the_bank_cannot_compute_is_not_held(options: dict[str, object]) -> None:
    base, adapter, tensors = trained(**{"target_modules": ("q_proj",)} | options)
    paths = [path for path in adapter.targets.adapted if path.endswith("q_proj")]
    assert held_weights(base.model, adapter.config, tensors, FOLDER, paths, 0) is None


def test_tensors_that_do_not_fit_are_refused_with_the_file() -> None:
    base, adapter, tensors = trained(target_modules=("q_proj",))
    first, second = sorted(tensors)[:2]
    broken = {key: tensor for key, tensor in tensors.items() if key != first} | {second: torch.zeros(1, 1)}
    with pytest.raises(AdapterError) as caught:
        held_weights(base.model, adapter.config, broken, FOLDER, adapter.targets.adapted, 0)
    assert len(caught.value.problems) == 2
    assert all(problem.startswith("the/adapter/adapter_model.safetensors: ") for problem in caught.value.problems)


def test_a_held_adapter_can_move_into_the_model() -> None:
    """With the same results, whatever its ranks, alphas and scaling."""
    options = {"rank_pattern": {"up_proj": 6, "layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    base, adapter, tensors = trained(target_modules=("q_proj", "up_proj"), use_rslora=True, **options)
    other, _adapter = adapted("llama", target_modules=("q_proj", "up_proj"), use_rslora=True, **options)
    weights = held_weights(base.model, adapter.config, tensors, FOLDER, adapter.targets.adapted, 0)
    assert weights is not None
    moved = inject_held(base.model, base.router, "moved", weights)
    assert base.router.active is None
    assert sorted(moved.targets.adapted) == sorted(adapter.targets.adapted)
    base.router.active = "moved"
    assert distance(logits_of(base), logits_of(other)) < 1e-11
