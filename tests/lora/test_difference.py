"""The update of full fine-tuning as an adapter, against the dense singular value decomposition in float64."""

import copy

import pytest
import torch

from lorasmith.errors import ConfigError
from lorasmith.lora import difference
from lorasmith.lora.adapted import linear_layers
from lorasmith.lora.difference import add_empty, cut, fill
from lorasmith.lora.merge import is_transposed, merged_weight
from lorasmith.lora.router import Router
from tests.support.experts import tiny_moe
from tests.support.families import tiny


def trained_copy(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data += 0.01 * torch.randn_like(p)
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # of gpt2, the weights are stored transposed
@pytest.mark.parametrize("rank", [3, 64])
def test_each_layer_gets_the_best_approximation(family, rank):
    model = tiny(family).double()
    trained = trained_copy(model)
    add_empty(model, Router(), "update", rank)
    spectra = {one.path: one for one in fill(model, trained, "update")}
    layers = linear_layers(model, "update")
    assert spectra.keys() == layers.keys()
    for path, layer in layers.items():
        before, after = layer.base_layer.weight, trained.get_submodule(path).weight
        update = (after - before).t() if is_transposed(layer.base_layer) else after - before
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        found = merged_weight(layer, "update") - before
        torch.testing.assert_close(found.t() if is_transposed(layer.base_layer) else found, best, rtol=0, atol=1e-12)
        one = spectra[path]
        torch.testing.assert_close(one.values_ES[0], S[:rank], rtol=1e-12, atol=0)
        assert one.norm == pytest.approx(update.norm().item(), rel=1e-12)
        assert (one.rest == 0) == (rank >= len(S))
        needed = int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum()) + 1
        assert one.directions == min(needed, rank + 1)
    cut(model, "update", 1)
    layer = layers[path]
    assert torch.linalg.matrix_rank(merged_weight(layer, "update") - layer.base_layer.weight) == 1


def test_the_randomized_decomposition_finds_the_same(monkeypatch):
    """On a decaying spectrum, as updates have it; the random numbers of others are not touched."""
    U, V = (torch.linalg.qr(torch.randn(300, 300)).Q for _side in range(2))
    S = torch.arange(1, 301).float() ** -0.5
    dense = (U * S) @ V.t()
    state = torch.get_rng_state()
    monkeypatch.setattr(difference, "EXACT", 0)
    left, values, right = difference._largest(dense, 64)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(values, S[:64], rtol=5e-3, atol=0)
    kept = (dense - (left * values) @ right.t()).square().sum()
    assert kept == pytest.approx(S[64:].square().sum().item(), rel=1e-2)


def test_experts_are_refused_and_the_model_is_as_before():
    model = tiny_moe("qwen3_moe")
    names = [name for name, _module in model.named_modules()]
    with pytest.raises(ConfigError, match="has experts"):
        add_empty(model, Router(), "update", 4)
    assert [name for name, _module in model.named_modules()] == names
