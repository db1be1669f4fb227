"""The first values of A and B."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.init import initialize
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer
from lorasmith.lora.router import Router


@pytest.mark.parametrize("kind", ["default", "gaussian"])
def test_start_is_random_in_a_zero_in_b_and_the_same_for_the_same_seed(kind: Any) -> None:
    drawn = []
    for seed in (0, 0, 1):
        module = LoRALayer(nn.Linear(400, 300), 400, 300, Router())
        module.add("a", 50, 1.0, 0.0, torch.device("cpu"))
        initialize(module, "a", LoraConfig(init_lora_weights=kind), torch.Generator().manual_seed(seed))
        assert not module.lora_B["a"].weight.any()
        drawn.append(module.lora_A["a"].weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # Kaiming-uniform with a = sqrt(5): U(-1/sqrt(I), 1/sqrt(I)); gaussian: N(0, 1/r)
    wanted = 1 / 50 if kind == "gaussian" else (1 / 400**0.5) / 3**0.5
    assert float(drawn[0].std()) == pytest.approx(wanted, rel=0.02)
    assert (float(drawn[0].abs().max()) <= 1 / 400**0.5) == (kind == "default")


@pytest.mark.parametrize("kind", ["default", "gaussian"])
def test_an_embedding_starts_with_a_zero(kind: Any) -> None:
    module = LoRAEmbedding(nn.Embedding(300, 40), Router())
    module.add("a", 8, 1.0, torch.device("cpu"))
    initialize(module, "a", LoraConfig(init_lora_weights=kind), torch.Generator().manual_seed(0))
    assert not module.lora_embedding_A["a"].any()
    wanted = 1.0  # of both, as in PEFT
    assert float(module.lora_embedding_B["a"].detach().std()) == pytest.approx(wanted, rel=0.15)


def test_parameters_without_memory_are_left_alone() -> None:
    """On the meta device, where sizes are counted only."""
    with torch.device("meta"):
        module = LoRALayer(nn.Linear(4, 3), 4, 3, Router())
    module.add("a", 2, 1.0, 0.0, torch.device("meta"))
    initialize(module, "a", LoraConfig(), torch.Generator())
    assert module.lora_A["a"].weight.is_meta


@pytest.mark.parametrize("kind", ["default", "gaussian"])
def test_without_a_generator_pefts_numbers_are_drawn(kind: Any) -> None:
    init = "gaussian" if kind == "gaussian" else True
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=init)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).requires_grad_(False), config)
    torch.manual_seed(7)
    ours = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    for i, wanted in enumerate(p for name, p in theirs.named_parameters() if "lora_A" in name):
        layer = LoRALayer(ours[i], ours[i].in_features, ours[i].out_features, Router())
        layer.add("a", 4, 1.0, 0.0, torch.device("cpu"))
        initialize(layer, "a", LoraConfig(init_lora_weights=kind), None)
        assert torch.equal(layer.lora_A["a"].weight, wanted)


def started(kind: Any, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    module = LoRALayer(nn.Linear(400, 300), 400, 300, Router())
    module.add("a", r, 1.0, 0.0, torch.device("cpu"))
    initialize(module, "a", LoraConfig(init_lora_weights=kind), torch.Generator().manual_seed(0))
    A, B = module.updates["a"].own_matrices
    return A.detach(), B.detach()


def test_orthogonal_matrices_have_no_product_and_pefts_size() -> None:
    A, B = started("orthogonal")
    assert A.abs().min() > 0
    assert float((B @ A).abs().max()) < 1e-6
    layer = peft.tuners.lora.Linear(nn.Linear(400, 300), "a", peft.LoraConfig(init_lora_weights="orthogonal"), r=8,
                                    lora_alpha=8)  # fmt: skip
    theirs = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    for ours, other in zip((A, B), theirs, strict=True):
        assert float(ours.std()) == pytest.approx(float(other.detach().std()), rel=0.2)


def test_false_is_random_in_both_as_in_peft() -> None:
    A, B = started(False)
    assert float(A.abs().max()) <= 1 / 400**0.5
    assert 0.9 / 8**0.5 < float(B.abs().max()) <= 1 / 8**0.5


def test_true_is_the_default() -> None:
    assert all(torch.equal(*pair) for pair in zip(started(True), started("default"), strict=True))
