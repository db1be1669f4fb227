"""Programs that read an adapter back see it: without it their logits are others."""

import pytest
import torch

from lorasmith.adapters.merge import adapter_logits, load_plain, plain_logits
from lorasmith.adapters.session import open_adapters
from lorasmith.config.model import ModelConfig
from lorasmith.export.mlx import export_mlx
from lorasmith.export.readback.adapters import has_mlx_lm, has_peft, mlx_logits, peft_logits

ROWS = [[3, 7, 11, 250], [5, 6]]


def off(found, wanted):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "program", ["peft", pytest.param("mlx-lm", marks=pytest.mark.skipif(not has_mlx_lm(), reason="needs mlx-lm"))]
)
def test_a_program_computes_the_logits_of_the_trained_model(program, adapter, tmp_path):
    assert has_peft()
    base = adapter.parent / "base"
    wanted = adapter_logits(open_adapters([adapter], ModelConfig(dtype="float32")), ROWS)
    if program == "peft":
        found, limit = peft_logits(adapter, base, ROWS, False), 1e-5
    else:
        export_mlx(adapter, tmp_path / "mlx")
        found, limit = mlx_logits(tmp_path / "mlx", base, ROWS), 1e-5
    assert off(found, wanted) < limit
    plain = plain_logits(load_plain(base, None, torch.float32, False), ROWS)
    assert off(plain, wanted) > 10 * limit
