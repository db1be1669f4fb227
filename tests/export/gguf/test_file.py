"""Types of tensors in a GGUF file. That files are read back equal is tested in test_export.py."""

import pytest
import torch
from gguf import GGMLQuantizationType

from lorasmith.export.gguf.file import rounded, type_of


def test_vectors_positions_and_short_rows_have_other_types():
    assert type_of("blk.0.attn_norm.weight", torch.ones(64), "q8_0") == GGMLQuantizationType.F32
    assert type_of("position_embd.weight", torch.ones(4, 64), "f16") == GGMLQuantizationType.F32
    assert type_of("token_embd.weight", torch.ones(4, 64), "q8_0") == GGMLQuantizationType.Q8_0
    assert type_of("token_embd.weight", torch.ones(4, 48), "q8_0") == GGMLQuantizationType.F16


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_rounding_is_that_of_torch(kind, dtype):
    weight = torch.randn(8, 64)
    assert torch.equal(rounded("token_embd.weight", weight, kind), weight.to(dtype).float())


def test_q8_0_rounds_to_half_a_step_of_each_block():
    weight = torch.randn(8, 64)
    steps = weight.view(8, 2, 32).abs().amax(-1, keepdim=True) / 127
    off = (rounded("token_embd.weight", weight, "q8_0") - weight).view(8, 2, 32).abs() / steps
    assert 0.4 < float(off.max()) < 0.5 + 0.07  # 127 steps, and a scale with eleven bits
