"""The product of A, B and the scaling is what a format gets, whatever its formula is."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasmith.export.plain_lora import add_to, folded
from lorasmith.lora.combine import Factors


def test_b_gets_what_a_formula_lacks():
    own = {"a": Factors(torch.randn(2, 5), torch.randn(3, 2), 3.0), "b": Factors(torch.randn(4, 5), torch.randn(3, 4))}
    found = folded(own, lambda factors: 8.0 / factors.rank)
    assert [factors.scaling for factors in found.values()] == [4.0, 2.0]
    for path, factors in found.items():
        assert torch.allclose(factors.delta(), own[path].delta())
        assert torch.equal(factors.A_RI, own[path].A_RI)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_product_is_added_to_the_weight(kind):
    model = nn.Sequential(nn.Linear(5, 3) if kind is nn.Linear else Conv1D(3, 5))
    own, x = Factors(torch.randn(2, 5), torch.randn(3, 2), 0.5), torch.randn(4, 5)
    wanted = model(x) + 0.5 * x @ own.A_RI.t() @ own.B_OR.t()
    add_to(model, {"0": own})
    assert torch.allclose(model(x), wanted, atol=1e-6)
