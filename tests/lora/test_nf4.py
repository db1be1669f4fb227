"""NF4 codes and maxima against those of bitsandbytes, bit for bit."""

import pytest
import torch
from torch import Tensor

from lorasmith.lora import nf4
from lorasmith.lora.nf4 import quantize_blocks
from lorasmith.system.bitsandbytes import bitsandbytes
from tests.support.quantized_weights import matrix

BLOCK = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_bitsandbytes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    quantize_4bit = bitsandbytes().functional.quantize_4bit
    packed, state = quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return packed, state.absmax


def assert_same(numbers: Tensor) -> None:
    for found, wanted in zip(quantize_blocks(numbers, BLOCK), by_bitsandbytes(numbers), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("step", [nf4.STEP, 200, BLOCK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_numbers(dtype: torch.dtype, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "STEP", step)
    assert_same(matrix((40 * BLOCK,), 1, dtype))


@pytest.mark.parametrize("neighbor", [-1, 0, 1])
def test_numbers_at_the_bounds_between_two_values_and_next_to_them(neighbor: int) -> None:
    code = bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    bounds = torch.cat([(code[:-1] + code[1:]) / 2, code, torch.tensor([0.0, -0.0])])
    near = torch.nextafter(bounds, torch.full_like(bounds, float(neighbor * 2))) if neighbor else bounds
    blocks = torch.zeros(8, BLOCK)
    blocks[:, : len(near)], blocks[:, -1] = near, 1.0  # which is the maximum
    assert_same((blocks * 2.0 ** torch.arange(-3, 5)[:, None]).view(-1))


def test_blocks_of_zeros_and_of_tiny_and_huge_numbers() -> None:
    blocks = torch.stack([torch.zeros(BLOCK), matrix((BLOCK,)) * 1e-42, matrix((BLOCK,)) * 1e37, torch.ones(BLOCK)])
    assert_same(blocks.view(-1))


def test_a_number_that_is_none_makes_its_block_none_and_no_other() -> None:
    numbers = matrix((2 * BLOCK,))
    numbers[3] = torch.nan
    packed, maxima = quantize_blocks(numbers, BLOCK)
    assert maxima.isnan().tolist() == [True, False]
    assert torch.equal(packed[BLOCK // 2 :], by_bitsandbytes(numbers[BLOCK:])[0])


def test_no_cell_contains_two_bounds() -> None:
    below, bound = nf4._cells()
    assert int(bound.isfinite().sum()) == 15
    assert below.tolist() == sorted(below.tolist())
    assert int(below[-1]) == 15
