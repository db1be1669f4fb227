"""Gradients are recorded inside the block, whatever the caller has set, and what he set is back afterwards."""

import pytest
import torch

from lorasmith.system.autograd import autograd_on


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_tensor_made_inside_can_be_trained(outer):
    with outer():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with autograd_on():
            x = torch.ones(2, requires_grad=True)
            (x * 3).sum().backward()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(x.grad, torch.full((2,), 3.0))
    x.data.add_(1)
    assert not x.is_inference()
