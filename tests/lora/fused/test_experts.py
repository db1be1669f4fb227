"""The fused experts equal the plain path, in output and gradients, for every kind of module that they take."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lorasmith.lora import parameters
from lorasmith.lora.fused.experts import can_fuse
from lorasmith.lora.parameters import LoRAParameters
from lorasmith.lora.router import Router
from tests.support.families import distance, far_apart

E, H, F, T = 5, 8, 6, 7
LIMIT = 1e-12  # float64: sums in another order
CONFIG = {"hidden_size": H, "intermediate_size": F, "moe_intermediate_size": F, "num_local_experts": E}
KINDS: dict[str, tuple[type[nn.Module], str]] = {
    "mixtral": (MixtralExperts, "gate_up_proj"),
    "gpt_oss": (GptOssExperts, "gate_up_proj"),  # transposed, with biases, interleaved
    "nemotron_h": (NemotronHExperts, "up_proj"),  # not gated
}


class Normed(MixtralExperts):
    """As muse_spark's: each expert's output passes through a norm of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_expert_norm = nn.LayerNorm(H)
        self.has_post_expert_norm = True


def layer(family: str, adapted: tuple[str, ...] | None = None) -> LoRAParameters:
    kind, up = KINDS.get(family, (Normed, "gate_up_proj"))
    config = AutoConfig.for_model("mixtral" if kind is Normed else family, **CONFIG)
    config.n_routed_experts, config._experts_implementation = E, "batched_mm"
    experts = kind(config).double().requires_grad_(False)
    made = LoRAParameters(experts, Router())
    made.router.active = "a"
    made.add("a", dict.fromkeys(adapted or (up, "down_proj"), (2, 0.7)))
    generator = torch.Generator().manual_seed(3)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
    return made


def inputs(tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x_TH = torch.randn(tokens, H, generator=generator, dtype=torch.float64).requires_grad_()
    index_TK = torch.stack([torch.randperm(E - 1, generator=generator)[:2] for _ in range(T)])[:tokens]
    weight_TK = torch.rand(tokens, 2, generator=generator, dtype=torch.float64).requires_grad_()
    return x_TH, index_TK, weight_TK  # no token uses the last expert


def outcome(made: LoRAParameters, fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
    x, index, weight = inputs()
    made.router.fused = fused
    y = made(x, index, weight)
    wanted = {"x": x, "weight": weight} | dict(made.lora_updates.named_parameters())
    return y.detach(), dict(zip(wanted, torch.autograd.grad((y * y).sum(), list(wanted.values())), strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that experts were fused."""
    found: list[int] = []
    right = parameters.fused_experts
    monkeypatch.setattr(parameters, "fused_experts", lambda *args: (found.append(1), right(*args))[1])
    return found


@pytest.mark.parametrize("family", [*KINDS, "normed"])
def test_fused_experts_equal_the_plain_path(family: str, calls: list[int]) -> None:
    made = layer(family)
    (plain, plain_gradients), (fused, gradients) = outcome(made, fused=False), outcome(made, fused=True)
    assert calls == [1]
    x, index, weight = inputs()
    assert distance(made.base_layer(x, index, weight), plain) > 0.01
    assert distance(fused, plain) < LIMIT
    assert not far_apart(gradients, plain_gradients, LIMIT)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_of_the_two_weights_may_have_no_adapter(name: str, calls: list[int]) -> None:
    made = layer("mixtral", (name,))
    (plain, plain_gradients), (fused, gradients) = outcome(made, fused=False), outcome(made, fused=True)
    assert calls == [1]
    assert distance(fused, plain) < LIMIT
    assert not far_apart(gradients, plain_gradients, LIMIT)


def test_an_index_of_no_expert_adds_nothing_and_no_tokens_give_no_output() -> None:
    made = layer("mixtral")
    x, index, weight = inputs()
    none = index.clone()
    none[2, 1] = E  # transformers' mark for no expert
    zero = weight.detach().clone()
    zero[2, 1] = 0
    assert distance(made(x, none, weight), made(x, index, zero)) < LIMIT
    assert made(*inputs(0)).shape == (0, H)
    assert not made(x, torch.full_like(index, E), weight).any()


def test_other_modules_and_calls_are_not_fused() -> None:
    made, (x, index, weight) = layer("mixtral"), inputs()
    names = ("gate_up_proj", "down_proj")
    assert can_fuse(made.base_layer, names, (x, index, weight), {})
    assert not can_fuse(made.base_layer, (*names, "extra"), (x, index, weight), {})
    assert not can_fuse(made.base_layer, names, (x, index), {"top_k_weights": weight})
    assert not can_fuse(made.base_layer, names, (x[None], index, weight), {})
    assert not can_fuse(JetMoeParallelExperts(E, H, F), ("weight",), (x, index, weight), {})
    made.base_layer._is_expert_parallel = True
    assert not can_fuse(made.base_layer, names, (x, index, weight), {})
