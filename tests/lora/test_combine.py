"""Combining adapters: equal to PEFT where PEFT is right, and to dense float64 matrices everywhere."""

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorasmith.errors import AdapterError
from lorasmith.lora import combine as module
from lorasmith.lora.combine import Factors, LayerError, combine, layer_error, padded, parts_by_layer, relative_error

Layers = dict[str, Factors]
EVERY = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


def factors(seed: int, rank: int, scaling: float = 1.0, shape: tuple[int, int] = (20, 30)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*size, generator=generator) for size in ((rank, shape[1]), (shape[0], rank)))
    return Factors(A, B, scaling)


def dense(one: Factors) -> Tensor:
    return one.B_OR.double() @ one.A_RI.double() * one.scaling


def exact(*parts: tuple[Factors, float]) -> Tensor:
    return torch.stack([dense(one) * weight for one, weight in parts]).sum(0)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def combined(method: str, *parts: tuple[Factors, float], **options: Any) -> Factors:
    """Of adapters with one layer."""
    return dict(combine([({"layer": one}, weight) for one, weight in parts], method, **options))["layer"]


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2), (1, -0.5), (-2, -0.1)])
def test_cat_is_the_exact_sum_of_different_ranks_and_scalings(weights):
    parts = list(zip((factors(0, 4, 2.0), factors(1, 6, 16 / 6**0.5)), weights, strict=True))
    found = combined("cat", *parts)
    assert (found.rank, found.scaling, found.A_RI.dtype) == (10, 1.0, torch.float32)
    assert distance(dense(found), exact(*parts)) < 1e-6
    assert layer_error("layer", parts, found).relative < 1e-6


def test_cat_needs_no_more_than_the_rank_that_the_layer_can_have():
    parts = [(factors(seed, 16), 1.0) for seed in range(3)]  # 48, of 20 x 30
    found = combined("cat", *parts)
    assert found.rank == 20
    assert distance(dense(found), exact(*parts)) < 1e-6


def test_cat_of_half_precision_does_not_round_the_weights_to_it():
    one = factors(0, 4)
    half = Factors(one.A_RI.bfloat16(), one.B_OR.bfloat16(), 0.3)
    found = combined("cat", (half, 0.7), (half, 0.1))
    assert distance(dense(found), exact((half, 0.8))) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 7, 9, 12])
def test_svd_is_the_best_of_its_rank(rank):
    parts = [(factors(0, 4, 2.0), 0.8), (factors(1, 5, 0.5), -0.6)]
    found, wanted = combined("svd", *parts, rank=rank), exact(*parts)
    U, S, Vh = torch.linalg.svd(wanted)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert found.rank == min(rank, 9)
    assert distance(dense(found), best) < 1e-6
    error = layer_error("layer", parts, found)
    assert math.isclose(error.relative, distance(best, wanted), rel_tol=1e-5, abs_tol=1e-6)
    assert math.isclose(error.norm, float(wanted.norm()), rel_tol=1e-9)


def test_svd_keeps_the_largest_rank_by_default():
    adapters = [({"x": factors(0, 4), "y": factors(1, 2)}, 1.0), ({"x": factors(2, 6)}, 1.0)]
    found = dict(combine(adapters, "svd"))
    assert {path: one.rank for path, one in found.items()} == {"x": 6, "y": 2}
    assert distance(dense(found["y"]), dense(adapters[0][0]["y"])) < 1e-6


@pytest.mark.parametrize("shape", [(70, 90), (90, 70)])
def test_a_large_pruned_matrix_is_cut_nearly_as_well_as_by_an_svd(monkeypatch, shape):
    parts = [(factors(seed, 4, shape=shape), 1.0) for seed in range(2)]
    options: dict[str, Any] = {"density": 0.3, "rank": 4}
    best = combined("magnitude_prune_svd", *parts, **options)
    monkeypatch.setattr(module, "DENSE", 16)
    monkeypatch.setattr(module, "OVERSAMPLE", 4)
    found = combined("magnitude_prune_svd", *parts, **options)
    assert found.A_RI.shape == best.A_RI.shape
    assert not torch.equal(found.A_RI, best.A_RI), "the same code ran"
    assert distance(dense(found), dense(best)) < 1e-3


# PEFT


@pytest.fixture(scope="module")
def theirs() -> peft.PeftModel:
    """A model of PEFT with two adapters: the same rank, other alphas and other targets, and random weights."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "init_lora_weights": False}
    first = peft.LoraConfig(lora_alpha=8, target_modules=["q_proj", "down_proj", "embed_tokens"], **options)
    model = peft.get_peft_model(LlamaForCausalLM(config), first, "one")
    model.add_adapter("two", peft.LoraConfig(lora_alpha=3, target_modules=["q_proj", "v_proj"], **options))
    model.add_adapter("larger", peft.LoraConfig(r=6, init_lora_weights=False, target_modules=["q_proj"]))
    return model


def layers_of(model: peft.PeftModel, adapter: str) -> Layers:
    """The updates of an adapter of PEFT, in the order of its modules."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            weights = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
            found[path] = Factors(*weights, layer.scaling[adapter])
        elif adapter in getattr(layer, "lora_embedding_A", {}):
            weights = layer.lora_embedding_A[adapter].data, layer.lora_embedding_B[adapter].data
            found[path] = Factors(*weights, layer.scaling[adapter])
    return found


def both(model: peft.PeftModel, names: list[str], weights: list[float], method: str, **options: Any) -> tuple[Any, Any]:
    """What PEFT and what lorasmith makes of the same adapters with the same seed, once PEFT has drawn its first A."""
    inject = model.base_model.inject_adapter

    def seeded(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(5)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.base_model, "inject_adapter", seeded)
        model.add_weighted_adapter(names, weights, "result", combination_type=method, **_in_peft(options))
    wanted = layers_of(model, "result")
    model.delete_adapter("result")
    torch.manual_seed(5)
    adapters = [(layers_of(model, name), weight) for name, weight in zip(names, weights, strict=True)]
    found = dict(combine(adapters, method, order=list(wanted), **options))
    assert found.keys() == wanted.keys()
    return found, wanted


def _in_peft(options: dict[str, Any]) -> dict[str, Any]:
    return {"svd_rank" if key == "rank" else key: value for key, value in options.items()}


# In an embedding and in Conv1D, PEFT draws the random mask of a transposed matrix, so that it is another one.
LINEAR_ONLY = ("dare_linear_svd", "dare_ties_svd")


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.6, 0.3]])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_peft_combines_to_the_same(theirs, method, weights, density):
    prunes = method not in ("cat", "linear", "svd")
    found, wanted = both(theirs, ["one", "two"], weights, method, **({"density": density} if prunes else {}))
    for path in wanted:
        if method in LINEAR_ONLY and path == "model.embed_tokens":
            break  # it is the first layer, so that the masks of the others are others too
        assert distance(dense(found[path]), dense(wanted[path])) < 1e-5, path


@pytest.mark.parametrize("method", LINEAR_ONLY)
def test_peft_draws_the_same_masks_of_linear_layers(theirs, method):
    found, wanted = both(theirs, ["two", "larger"], [1.0, 0.5], method, density=0.5, rank=5)
    for path in wanted:
        assert distance(dense(found[path]), dense(wanted[path])) < 1e-5, path


@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_ties"])
def test_peft_elects_signs_by_frequency_to_the_same(theirs, method):
    options = {"density": 0.6, "majority_sign_method": "frequency"}
    found, wanted = both(theirs, ["one", "two"], [1.0, 0.4], method, **options)
    by_sum = both(theirs, ["one", "two"], [1.0, 0.4], method, density=0.6)[0]
    for path in wanted:
        assert distance(dense(found[path]), dense(wanted[path])) < 1e-5, path
    assert any(distance(dense(found[path]), dense(by_sum[path])) > 0.01 for path in wanted)


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "magnitude_prune", "magnitude_prune_svd", "dare_linear"])
def test_peft_subtracts_to_the_same(theirs, method):
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.5}
    found, wanted = both(theirs, ["one", "two"], [1.0, -0.4], method, **options)
    for path in wanted:
        assert distance(dense(found[path]), dense(wanted[path])) < 1e-5, path


def test_different_ranks_are_combined_as_in_peft(theirs):
    for method in ("cat", "svd"):
        found, wanted = both(theirs, ["two", "larger"], [0.5, 2.0], method)
        for path in wanted:
            assert distance(dense(found[path]), dense(wanted[path])) < 1e-5


# TIES with negative weights: PEFT 0.21.2 elects the signs before the weights are applied


def test_ties_with_a_negative_weight_is_ties_with_the_negated_adapter():
    one, two = factors(0, 4), factors(1, 4)
    negated = Factors(two.A_RI, -two.B_OR)
    for options in ({}, {"majority_sign_method": "frequency"}):
        found = combined("ties_svd", (one, 1.0), (two, -0.5), density=0.5, rank=20, **options)
        wanted = combined("ties_svd", (one, 1.0), (negated, 0.5), density=0.5, rank=20, **options)
        assert distance(dense(found), dense(wanted)) < 1e-6


# linear, and what it is not


def test_linear_is_not_the_sum_and_the_error_says_so():
    parts = [(factors(0, 4, 2.0), 1.0), (factors(1, 4, 2.0), -1.0)]
    found = combined("linear", *parts)
    error = layer_error("layer", parts, found)
    assert math.isclose(error.relative, distance(dense(found), exact(*parts)), rel_tol=1e-5)
    assert error.relative > 0.5
    assert layer_error("layer", parts, combined("svd", *parts, rank=4)).relative < error.relative
    alone = [(factors(0, 4, 2.0), -0.3)]
    assert layer_error("layer", alone, combined("linear", *alone)).relative < 1e-6


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_by_value_different_ranks_are_refused(method):
    other = "cat or svd" if method == "linear" else f"{method}_svd"
    with pytest.raises(AdapterError, match=rf"^layer: the adapters have the ranks 4, 6, but {method} .*Use {other}, "):
        combined(method, (factors(0, 4), 1.0), (factors(1, 6), 1.0), density=0.5)


def test_a_layer_of_one_adapter_only_keeps_its_weight():
    adapters = [({"x": factors(0, 4)}, 0.5), ({"y": factors(1, 4)}, -2.0)]
    for method in ("cat", "linear", "svd"):
        found = dict(combine(adapters, method))
        assert list(found) == ["x", "y"]
        assert distance(dense(found["x"]), exact((adapters[0][0]["x"], 0.5))) < 1e-6
        assert distance(dense(found["y"]), exact((adapters[1][0]["y"], -2.0))) < 1e-6


def test_other_shapes_are_refused():
    with pytest.raises(AdapterError, match=r"^layer: .* has the shapes \(20, 30\), \(20, 31\)\.$"):
        parts_by_layer([({"layer": factors(0, 4)}, 1.0), ({"layer": factors(0, 4, shape=(20, 31))}, 1.0)])


def test_dare_keeps_the_expectation_and_its_seed():
    one = factors(0, 4)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return dense(combined("dare_linear_svd", (one, 1.0), density=0.5, rank=20, generator=generator))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    mean = torch.stack([drawn(seed) for seed in range(400)]).mean(0)
    assert distance(mean, dense(one)) < 4 / 400**0.5  # each value has the deviation of its own size at density 0.5


@pytest.mark.parametrize("method", EVERY)
def test_density_one_and_one_adapter_change_nothing(method):
    one = factors(0, 4, 2.0)
    found = combined(method, (one, 1.0), density=1.0)
    assert distance(dense(found), dense(one)) < 1e-5


def test_float64_stays_float64():
    one = factors(0, 4)
    wide = Factors(one.A_RI.double(), one.B_OR.double(), 0.1)
    found = combined("cat", (wide, 0.3), (one, 0.1))
    assert found.A_RI.dtype == torch.float64
    assert distance(dense(found), exact((wide, 0.3), (one, 0.1))) < 1e-15


def test_padding_changes_nothing():
    found = padded(factors(0, 4, 0.5), 7)
    assert (found.rank, tuple(found.B_OR.shape)) == (7, (20, 7))
    assert torch.equal(dense(found), dense(factors(0, 4, 0.5)))


def test_errors_in_all():
    layers = [LayerError("x", 3.0, 6.0), LayerError("y", 4.0, 8.0)]
    assert relative_error(layers) == 0.5
    assert LayerError("x", 0.0, 0.0).relative == 0.0
    assert LayerError("x", 1.0, 0.0).relative == math.inf
