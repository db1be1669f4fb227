"""Singular values of updates, against those of the dense product, and the update with half its rank."""

import math
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import PEFT_PREFIX, inject
from lorasmith.lora.parameters import ParameterUpdate
from lorasmith.lora.router import Router
from lorasmith.lora.spectrum import (
    LayerSpectrum,
    effective_ranks,
    reduced,
    singular_values,
    spectra,
    strongest_half,
)
from tests.support.families import stir, tiny

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64; both ways round in the last digits only


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("O", "I", "r"), [(30, 20, 4), (5, 40, 8), (40, 3, 8), (6, 7, 1)])
def test_singular_values_are_those_of_the_dense_product(O, I, r):
    A, B = random(1, r, I), random(1, O, r)
    count = min(O, I, r)
    dense = torch.linalg.svdvals(B[0] @ A[0])
    torch.testing.assert_close(singular_values(A, B)[0], dense[:count], **EXACT)
    assert singular_values(A, B).shape == (1, count)
    assert dense[count:].max().item() < 1e-12 if len(dense) > count else True


def test_small_singular_values_are_not_lost():
    """A product of A with itself would lose what is 1e-8 of the largest and below."""
    A, B = torch.linalg.qr(random(30, 3)).Q.mT[None], torch.linalg.qr(random(20, 3)).Q[None]
    found = singular_values(A, B * torch.tensor([1.0, 1e-6, 1e-11], dtype=torch.float64))
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1e-6, 1e-11], dtype=torch.float64), rtol=1e-4, atol=0)


def keys(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"{PEFT_PREFIX}{path}.lora_A.weight": A, f"{PEFT_PREFIX}{path}.lora_B.weight": B}


def test_each_layer_has_its_scaling_and_the_order_is_that_of_the_layers():
    parts = {f"model.layers.{i}.mlp.up_proj": (random(4, 9), random(8, 4)) for i in (10, 9)}
    tensors = {key: t for path, pair in parts.items() for key, t in keys(path, *pair).items()}
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={"9.mlp.up_proj": 32})
    nine, ten = spectra(tensors, config)
    assert (nine.layer, ten.layer, nine.kind) == (9, 10, "mlp.up_proj")
    for one, alpha in ((nine, 32), (ten, 8)):
        A, B = parts[one.path]
        torch.testing.assert_close(one.values_ES[0], torch.linalg.svdvals(B @ A)[:4] * alpha / 2, **EXACT)
        assert one.norm == pytest.approx(float((B @ A).norm()) * alpha / 2)


def test_the_rank_is_that_of_the_matrices_and_embeddings_count():
    A, B = random(3, 11), random(5, 3)
    tensors = keys("model.layers.0.q", A, B)
    tensors |= {f"{PEFT_PREFIX}model.embed.lora_embedding_A": A, f"{PEFT_PREFIX}model.embed.lora_embedding_B": B}
    embed, layer = spectra(tensors, LoraConfig(r=8, lora_alpha=8))
    assert (embed.path, embed.layer, embed.kind, layer.rank) == ("model.embed", None, "model.embed", 3)
    torch.testing.assert_close(embed.values_ES, layer.values_ES)
    torch.testing.assert_close(layer.values_ES[0], torch.linalg.svdvals(B @ A)[:3] * 8 / 3, **EXACT)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_every_expert_has_its_own_values(name):
    weight = random(3, 10, 6)
    update = ParameterUpdate(weight, transposed=False, r=2, scaling=4.0)
    with torch.no_grad():
        update.lora_A.normal_()
        update.lora_B.normal_()
    path = "model.layers.0.mlp.experts" + (".base_layer" if name == "gate_up_proj" else "")
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=(), target_parameters=("experts.gate_up_proj", "experts.down_proj"),
        rank_pattern={"experts.gate_up_proj": 2, "experts.down_proj": 2},
    )  # fmt: skip
    (found,) = spectra(keys(path, update.lora_A.detach(), update.lora_B.detach()), config)
    dense = torch.linalg.svdvals((update.merged(weight) - weight).detach())[:, :2]
    torch.testing.assert_close(found.values_ES, dense, **EXACT)
    assert (found.rank, found.layer) == (2, 0)


def test_dora_is_told():
    tensors = keys("model.layers.0.q", random(2, 5), random(5, 2))
    assert not next(spectra(tensors, LoraConfig(r=2))).has_magnitude
    tensors[f"{PEFT_PREFIX}model.layers.0.q.lora_magnitude_vector"] = random(5)
    (found,) = spectra(tensors, LoraConfig(r=2, use_dora=True))
    assert found.has_magnitude


def test_the_effective_rank_counts_directions():
    values = torch.tensor([[3.0, 3, 3, 3], [5, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert effective_ranks(values)[:3].tolist() == pytest.approx([4, 1, 2])
    assert math.isnan(effective_ranks(values)[3])
    spread = LayerSpectrum("x", torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    assert spread.effective_rank == pytest.approx(math.exp(math.log(3) - 2 / 3 * math.log(2)))
    assert spread.share == pytest.approx(spread.effective_rank / 2)
    assert LayerSpectrum("x", torch.tensor([[3.1, 1.0, 0.1]], dtype=torch.float64)).directions == 1  # 9.6 of 10.6
    assert LayerSpectrum("x", torch.tensor([[3.0, 1.1, 0.1]], dtype=torch.float64)).directions == 2


def test_half_of_the_directions_is_the_best_approximation():
    A, B = random(2, 5, 12), random(2, 9, 5)
    half_A, half_B = reduced(A, B)
    assert (half_A.shape, half_B.shape) == (A.shape, B.shape)
    for i in range(2):
        U, values, Vh = torch.linalg.svd(B[i] @ A[i])
        torch.testing.assert_close(half_B[i] @ half_A[i], U[:, :2] * values[:2] @ Vh[:2], **EXACT)


def test_a_model_computes_with_half_the_rank_and_gets_its_values_back():
    model = tiny("llama").double()
    router, config = Router(), LoraConfig(r=4, lora_alpha=8)
    adapter = inject(model, config, router, "a")
    stir(adapter)
    before = {key: p.detach().clone() for key, p in adapter.parameters.items()}
    wanted = [one.values_ES[:, :2] for one in spectra(before, config)]
    with suppress(ZeroDivisionError), strongest_half(adapter.parameters, config) as changed:
        assert changed
        halves = list(spectra(adapter.parameters, config))
        for half, values in zip(halves, wanted, strict=True):
            torch.testing.assert_close(half.values_ES[:, :2], values, rtol=1e-5, atol=1e-6)  # parameters may be float32
            assert half.values_ES[:, 2:].max() < 1e-5 * values.max()
        raise ZeroDivisionError
    assert all(torch.equal(p, before[key]) for key, p in adapter.parameters.items())


def test_rank_one_has_no_half():
    tensors = keys("model.layers.0.q", random(1, 5), random(5, 1))
    with strongest_half(tensors, LoraConfig(r=1)) as changed:
        assert not changed
