"""Which modules are recognized, and that those that compute something else are not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lorasmith.model.fast.modules import FastAttention, FastGatedMLP, FastModule, FastRMSNorm
from lorasmith.model.fast.recognize import recognize_modules
from tests.support.families import CONFIGS, distance, tiny, tiny_base
from tests.support.fast_base import output_and_gradient


class Tilted(nn.Module):
    """An RMSNorm in one of the ways in which families write it."""

    def __init__(self, width: int, offset: float, wide: bool) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width) + 1, requires_grad=False), 1e-3
        self.offset, self.wide = offset, wide

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x.to(wide) * (x.to(wide).pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.wide:
            return (n * (self.weight.to(wide) + self.offset)).to(x.dtype)
        return n.to(x.dtype) * (self.weight + self.offset)


class TiltedRMSNorm(Tilted):
    """By its name one that is tried."""


class CentredRMSNorm(Tilted):
    """By its name one, by its numbers none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "wide"), [(0.0, False), (0.0, True), (1.0, True)])
def test_variants_of_rms_norm(offset: float, wide: bool, dtype: torch.dtype) -> None:
    module = TiltedRMSNorm(16, offset, wide).to(dtype)
    x = torch.randn(3, 16, dtype=torch.float64).to(dtype)
    wanted = output_and_gradient(module, x)
    recognize_modules(module)
    assert isinstance(module, FastRMSNorm)
    assert module.variant[:2] == (1e-3, offset)
    module.plain = False
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    for found, right in zip(output_and_gradient(module, x), wanted, strict=True):
        assert found.dtype == dtype
        assert distance(found, right) < limit


@pytest.mark.parametrize(
    "module", [CentredRMSNorm(16, 0, True), TiltedRMSNorm(16, 0.5, True), nn.LayerNorm(16), nn.RMSNorm((2, 8))]
)
def test_what_is_no_rms_norm_stays_as_it_is(module: nn.Module) -> None:
    kind, state = type(module), dict(vars(module))
    recognize_modules(module)
    assert type(module) is kind
    assert vars(module) == state


class ScaledMLP(LlamaMLP):
    """Needs more than x, as shared experts with scales do."""

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        return super().forward(x) * by


class LayeredMLP(LlamaMLP):
    """May be told more than x, as an MLP that serves several layers is."""

    def forward(self, x: Tensor, layer: int = 0) -> Tensor:
        return super().forward(x) + layer


def mlp(kind: type[LlamaMLP] = LlamaMLP, act: str = "silu") -> LlamaMLP:
    module = kind(AutoConfig.for_model("llama", **CONFIGS["llama"] | {"hidden_act": act})).requires_grad_(False)
    for p in module.parameters():
        p.data.normal_(0, 0.5)
    return module


@pytest.mark.parametrize(("kind", "more"), [(ScaledMLP, torch.ones(32)), (LayeredMLP, 2)])
def test_what_a_module_takes_beside_x_still_arrives(kind: type[LlamaMLP], more: Any) -> None:
    module, x = mlp(kind), torch.randn(1, 3, 32)
    wanted = module(x, more)
    recognize_modules(module)
    assert torch.equal(module(x, more), wanted)
    for part in module.modules():
        if isinstance(part, FastModule):
            part.plain = False
    assert distance(module(x, more), wanted) < 1e-6


@pytest.mark.parametrize(
    ("act", "known"), [("silu", True), ("gelu_pytorch_tanh", True), ("relu", False), ("gelu", False)]
)
def test_gated_mlps_are_known_by_their_activation(act: str, known: bool) -> None:
    module = mlp(act=act)
    recognize_modules(module)
    assert isinstance(module, FastGatedMLP) == known
    assert isinstance(module, LlamaMLP)


def test_recognition_leaves_every_tensor_and_draws_no_number() -> None:
    base = tiny_base("gemma3_text")
    before, state = copy.deepcopy(base.model.state_dict()), torch.get_rng_state()
    recognize_modules(base.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    kinds = {FastRMSNorm, FastGatedMLP, FastAttention}
    assert {
        next(k for k in kinds if isinstance(m, k)) for m in base.model.modules() if isinstance(m, FastModule)
    } == kinds
    assert all(m.plain for m in base.model.modules() if isinstance(m, FastModule)), "until verified"


def test_an_unknown_norm_in_a_known_model_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    norms = [m for m in model.modules() if isinstance(m, LlamaRMSNorm)]
    own = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: own(self, x) + 0.1)
    recognize_modules(model)
    assert len(norms) == 5
    assert not any(isinstance(m, FastModule) for m in norms)
