"""Quantized matrices against bitsandbytes' own functions, and their products against dense ones."""

import pytest
import torch

from lorasmith.lora import quantized_weight
from lorasmith.lora.quantized_weight import quantize
from tests.support.quantized_weights import FORMATS, by_bitsandbytes, matrix, weight_of

SHAPES = [(64, 128), (48, 32), (200, 64), (33, 24), (7, 10)]


@pytest.mark.parametrize("piece", [2**24, 256, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_values_are_those_of_bitsandbytes(
    form: str, shape: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weight, "PIECE", piece)
    W = matrix(shape)
    found = quantize(W, form, torch.float32)
    wanted = by_bitsandbytes(W, form)
    assert torch.allclose(found.dequantized(), wanted, rtol=1e-6, atol=0)
    assert 1e-4 < float((wanted - W).norm() / W.norm()) < 0.2
    ids = torch.tensor([[0, 3], [shape[0] - 1, 3]])
    assert torch.allclose(found.at(ids), wanted[ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("piece", [2**24, 256, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_products_are_those_of_the_dense_weight(
    form: str, shape: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weight, "PIECE", piece)
    weight, x, dy = weight_of(form, shape), matrix((5, shape[1]), 1), matrix((5, shape[0]), 2)
    W, start = weight.dequantized().double(), matrix((5, shape[1]), 4)
    out = weight.product(x, torch.empty(5, shape[0]))
    back = weight.add_product(dy, start.clone())
    assert torch.allclose(out.double(), x.double() @ W.t(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(back.double(), start + dy.double() @ W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_memory_for_converted_rows_is_used_again_also_after_inference_mode(form: str) -> None:
    weight = weight_of(form)
    with torch.inference_mode():
        first = weight.rows(0, 48, torch.float32)
        wanted = first.clone()
    again = weight.rows(0, 48, torch.float32)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, wanted)


def test_a_weight_knows_what_it_was_made_from() -> None:
    W = matrix((48, 64))
    for form in FORMATS:
        weight = quantize(W, form, torch.float32)
        assert weight.is_from(W)
        assert not weight.is_from(W + 0.1)
        assert not weight.is_from(W[:40])
