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


@pytest.mark.parametrize("T", [5, quantized_weight.FEW + 1])
@pytest.mark.parametrize("piece", [2**24, 256, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_products_are_those_of_the_dense_weight(
    form: str, shape: tuple[int, int], piece: int, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weight, "PIECE", piece)
    monkeypatch.setattr(quantized_weight, "STEP", min(quantized_weight.STEP, max(piece, 64)))
    weight, x, dy = weight_of(form, shape), matrix((T, shape[1]), 1), matrix((T, shape[0]), 2)
    W, start = weight.dequantized().double(), matrix((T, shape[1]), 4)
    out = weight.product(x, torch.empty(T, shape[0]))
    back = weight.add_product(dy, start.clone())
    assert torch.allclose(out.double(), x.double() @ W.t(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(back.double(), start + dy.double() @ W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, quantized_weight.FEW, quantized_weight.FEW + 1])
@pytest.mark.parametrize("form", FORMATS)
def test_products_in_bfloat16_into_columns_of_a_matrix(form: str, T: int) -> None:
    """Few tokens of an int8 weight are computed by a kernel of torch, which must agree with the plain product."""
    weight, x = weight_of(form, (48, 128), torch.bfloat16), matrix((T, 130), 1, torch.bfloat16)[:, 1:129]
    wide = torch.full((T, 60), 7.0, dtype=torch.bfloat16)
    weight.product(x, wide[:, 4:52])
    wanted = x.double() @ weight.dequantized(torch.float64).t()
    assert float((wide[:, 4:52] - wanted).norm() / wanted.norm()) < 5e-3  # input, scales and output in bfloat16
    assert torch.equal(wide[:, :4], torch.full((T, 4), 7.0, dtype=torch.bfloat16))
    assert torch.equal(wide[:, 52:], torch.full((T, 8), 7.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("form", FORMATS)
def test_memory_for_converted_rows_is_used_again_also_after_inference_mode(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weight, "STEP", 256)  # fewer numbers than the weight has
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


@pytest.mark.parametrize("form", FORMATS)
def test_float64_is_computed_from_float32(form: str) -> None:
    weight = weight_of(form)
    assert torch.allclose(weight.dequantized(torch.float64), weight.dequantized(torch.float32).double(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(33, 64), (7, 128), (48, 96), (7, 10)])
def test_few_tokens_at_an_address_that_no_vector_instruction_can_load(shape: tuple[int, int]) -> None:
    """torch's kernel ends the process there, or reads beyond rows whose length is no multiple of its vectors."""
    weight = weight_of("int8", shape, torch.bfloat16)
    x = matrix((1, shape[1] + 1), 1, torch.bfloat16)[:, 1:]
    wanted = x.double() @ weight.dequantized(torch.float64).t()
    found = weight.product(x, torch.empty(1, shape[0], dtype=torch.bfloat16))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2  # roundings to bfloat16
