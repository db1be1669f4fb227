"""The update of one adapter in one layer."""

import pytest
import torch
from torch import nn

from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.router import Router
from lorasmith.lora.update import Update
from tests.support.families import distance


def update_of(kind: type[Update] = Update, dropout: float = 0.0) -> Update:
    layer = LoRALayer(nn.Linear(5, 7, bias=False).double().requires_grad_(False), 5, 7, Router())
    layer.add("a", 3, 0.5, dropout, torch.device("cpu"))
    for matrix in layer.updates["a"].matrices:
        nn.init.normal_(matrix)
    return kind(layer, "a", 0.5)


def test_forward_low_rank_and_merged_are_one_formula() -> None:
    update, x = update_of(), torch.randn(4, 5, dtype=torch.float64)
    W, (A, B) = update.layer.base_layer.weight, update.matrices
    y = x @ W.t()
    before = y.clone()
    wanted = x @ (W + 0.5 * B @ A).t()
    assert distance(update.forward(x, y), wanted) < 1e-12
    assert torch.equal(y, before), "the base layer's output is not written to"
    assert distance(y + update.low_rank(x), wanted) < 1e-12
    assert distance(x @ update.merged(W).t(), wanted) < 1e-12


def test_a_subclass_is_never_plain_low_rank() -> None:
    class Renamed(Update):
        """The same as plain LoRA, as far as anyone can see."""

    assert update_of().is_low_rank
    assert not update_of(Renamed).is_low_rank


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_active_in_training_alone(dropout: float) -> None:
    update = update_of(dropout=dropout)
    assert update.drops == (dropout > 0)
    update.layer.eval()
    assert not update.drops


def test_parameters_have_the_names_of_pefts_files() -> None:
    update = update_of()
    assert {name: tuple(p.shape) for name, p in update.parameters.items()} == {
        "lora_A.weight": (3, 5),
        "lora_B.weight": (7, 3),
    }
    assert update.problem(update.layer.base_layer) == ""
