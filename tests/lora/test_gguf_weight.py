"""Weights in the blocks of a GGUF file, against the values that the `gguf` package gives them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lorasmith.lora import gguf_weight
from lorasmith.lora.gguf_weight import GgufWeight, has_formats, is_known
from tests.support.quantized_weights import matrix

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
O, I = 24, 512
pytestmark = pytest.mark.skipif(not has_formats(), reason="transformers before 5.23 has no formats of GGUF in torch")


def blocks_of(kind: Kind) -> np.ndarray:
    """Quantized random numbers, or, where `gguf` cannot quantize, random bytes with scales below 1."""
    try:
        return gguf.quantize(matrix((O, I)).numpy(), kind)
    except NotImplementedError:
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        made = np.random.default_rng(0).integers(0, 256, (O, I // numbers, size), dtype=np.uint8)
        for place in (0, 2, size - 2):  # where one of these formats has a scale in half precision
            made[..., place + 1] &= 0x3B
        return made.reshape(O, -1)


def both(kind: Kind, dtype: torch.dtype = torch.float32) -> tuple[GgufWeight, Tensor]:
    blocks = blocks_of(kind)
    return GgufWeight(torch.from_numpy(blocks), int(kind), dtype), torch.from_numpy(gguf.dequantize(blocks, kind))


known = [kind for kind in KINDS if has_formats() and is_known(int(kind))]


@pytest.mark.parametrize("step", [gguf_weight.STEP, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", known, ids=lambda kind: kind.name)
def test_values_are_those_of_the_file(
    kind: Kind, dtype: torch.dtype, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_weight, "STEP", step)
    weight, W = both(kind, dtype)
    assert weight.shape == (O, I)
    assert torch.equal(weight.dequantized(), W.to(dtype))
    ids = torch.tensor([[0, 3], [O - 1, 3]])
    assert torch.equal(weight.at(ids), W[ids].to(dtype))
    assert weight.is_from(W)
    assert not weight.is_from(W + W.abs().max())
    assert not weight.is_from(W[:, :256])


@pytest.mark.parametrize("kind", known, ids=lambda kind: kind.name)
def test_products_are_those_of_the_dense_weight(kind: Kind) -> None:
    weight, W = both(kind)
    W, x, dy, start = W.double(), matrix((5, I), 1), matrix((5, O), 2), matrix((5, I), 4)
    out = weight.product(x, torch.empty(5, O))
    back = weight.add_product(dy, start.clone())
    for found, wanted in ((out, x.double() @ W.t()), (back, start + dy.double() @ W)):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_formats_of_the_issue_are_known() -> None:
    assert {Kind.Q4_0, Kind.Q4_K, Kind.Q8_0} <= set(known)
    assert not is_known(int(Kind.F16))
