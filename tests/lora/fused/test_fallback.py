"""Where layers with one input cannot be computed as one, each computes alone; and nothing stale is ever handed out."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import inject, remove
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.head import loss_sum
from lorasmith.model.verify import link_fused_linears
from tests.support.families import adapted, distance, example, far_apart, gradients, one_row, stir
from tests.support.fast_base import fast_base
from tests.support.fused_layers import WIDTHS, I, T, formula, layers, tokens, trained, with_gradients

# --- where one pass cannot do it --------------------------------------------------------------------------------------


def assert_alone(made: Sequence[LoRALayer], x: Tensor, passes: Any, adapter: str = "a") -> None:
    """Each layer computes for itself, and right."""
    outs = [one(x) for one in made]
    assert passes.count == 0
    assert all(distance(o, w) < 1e-12 for o, w in zip(outs, formula(made, x, adapter), strict=True))


def test_second_adapter_takes_its_turn(passes: Any) -> None:
    made, x = layers(adapters=("a", "b")), tokens()
    for i, adapter in enumerate(("a", "b", "a"), start=1):
        made[0].router.route([(adapter, 0, T)])
        ours = with_gradients([one(x) for one in made], [x, *trained(made, adapter)])
        wanted = with_gradients(formula(made, x, adapter), [x, *trained(made, adapter)])
        assert all(distance(o, w) < 1e-12 for o, w in zip(ours, wanted, strict=True))
        assert passes.count == i


def test_several_adapters_in_one_row_fall_back(passes: Any) -> None:
    made, x = layers(adapters=("a", "b")), tokens()
    made[0].router.route([("a", 0, 4), (None, 4, 6), ("b", 6, T)])
    outs = [one(x) for one in made]
    assert passes.count == 0
    for out, one, a, b in zip(outs, made, formula(made, x, "a"), formula(made, x, "b"), strict=True):
        assert distance(out, torch.cat([a[:, :4], one.base_layer(x)[:, 4:6], b[:, 6:]], 1)) < 1e-12


def test_several_active_adapters_fall_back_and_add_up(passes: Any) -> None:
    made, x = layers(adapters=("a", "b", "c")), tokens()
    made[0].router.activate(["a", "c"])
    inputs = [x, *trained(made, "a"), *trained(made, "c")]
    ours = with_gradients([one(x) for one in made], inputs)
    pairs = zip(made, formula(made, x, "a"), formula(made, x, "c"), strict=True)
    wanted = with_gradients([a + c - one.base_layer(x) for one, a, c in pairs], inputs)
    assert passes.count == 0
    assert all(distance(o, w) < 1e-12 for o, w in zip(ours, wanted, strict=True))
    made[0].router.activate(["c"])
    assert all(distance(one(x), w) < 1e-12 for one, w in zip(made, formula(made, x, "c"), strict=True))
    assert passes.count == 1


@pytest.mark.parametrize("adapter", [None, "nobody"])
def test_without_an_adapter_the_base_runs_alone(adapter: str | None, passes: Any) -> None:
    made, x = layers(), tokens()
    made[0].router.route([(adapter, 0, T)])
    assert all(torch.equal(one(x), one.base_layer(x)) for one in made)
    assert passes.count == 0


def test_an_adapter_on_only_one_of_them_falls_back(passes: Any) -> None:
    made, x = layers(), tokens()
    made[1].add("b", 2, 1.0, 0.0, torch.device("cpu"))
    nn.init.normal_(made[1].lora_B["b"].weight)
    made[0].router.active = "b"
    outs = [one(x) for one in made]
    assert passes.count == 0
    assert all(torch.equal(outs[i], made[i].base_layer(x)) for i in (0, 2))
    assert distance(outs[1], formula(made[1:2], x, "b")[0]) < 1e-12


def test_dropout_falls_back_in_training_alone(passes: Any) -> None:
    made, x = layers(dropout=0.5), tokens()
    drawn = [one(x) for one in made]
    assert passes.count == 0
    assert not torch.equal(drawn[0], made[0](x))
    for one in made:
        one.eval()
    outs = [one(x) for one in made]
    assert passes.count == 1
    assert all(distance(o, w) < 1e-12 for o, w in zip(outs, formula(made, x), strict=True))


@pytest.mark.parametrize("kind", ["trained bias", "Conv1D", "a class of its own", "switched off"])
def test_other_layers_fall_back(kind: str, passes: Any) -> None:
    made, x = layers(bias=True), tokens()
    if kind == "trained bias":
        made[2].base_layer.bias.requires_grad_(True)
    elif kind == "Conv1D":
        made[1].base_layer = Conv1D(WIDTHS[1], I).double().requires_grad_(False)
    elif kind == "a class of its own":
        made[1].base_layer.__class__ = type("Quantized", (nn.Linear,), {})
    else:
        made[0].router.fused = False
    assert_alone(made, x, passes)


def test_layers_run_in_inference_mode() -> None:
    """Its tensors have no version by which to see a change."""
    made = layers()
    with torch.inference_mode():
        x = tokens()
        assert all(distance(one(x), w) < 1e-12 for one, w in zip(made, formula(made, x), strict=True))
        x += 1
        assert all(distance(one(x), w) < 1e-12 for one, w in zip(made, formula(made, x), strict=True))


def test_more_arguments_go_to_the_base(passes: Any) -> None:
    made, x = layers(), tokens()

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
            return super().forward(x) * by

    made[0].base_layer.__class__ = Scaled
    assert distance(made[0](x, by=2.0) - made[0](x), made[0].base_layer(x)) < 1e-12
    assert passes.count == 0


@pytest.mark.usefixtures("exact")
def test_removed_adapters_leave_the_others_right() -> None:
    """The first adapter was on q, k and v, the second is on q and v: k leaves the pass of the three."""
    found = []
    for make in (fast_base, adapted):
        base, _first = make("llama", target_modules=("q_proj", "k_proj", "v_proj"))
        second = inject(base.model, LoraConfig(r=3, target_modules=("q_proj", "v_proj")), base.router, "second")
        stir(second, seed=2)
        remove(base.model, "default")
        assert not isinstance(base.model.model.layers[0].self_attn.k_proj, LoRALayer)
        loss_sum(base, one_row([example(9, 1), example(5, 2)], "second")).backward()
        found.append(gradients(second))
    assert not far_apart(*found, 1e-10)


# --- nothing stale ----------------------------------------------------------------------------------------------------


def change_in_place(made: list[LoRALayer], x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1)


def switch(made: list[LoRALayer], x: Tensor) -> None:
    made[0].router.active = "b"


def move(made: list[LoRALayer], x: Tensor) -> None:
    with torch.no_grad():
        for p in trained(made):
            p.mul_(2)
    made[0].router.route(None)  # as every forward does


CHANGES: dict[str, Callable[[list[LoRALayer], Tensor], None]] = {
    "x changed in place": change_in_place,
    "adapter switched": switch,
    "weights moved": move,
    "another forward": lambda made, x: made[0].router.route(None),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_was_computed_for_another_forward_is_not_used(case: str, passes: Any) -> None:
    """Only q asks in the first forward; in the second, what waits for k and v is old."""
    made, x = layers(adapters=("a", "b")), tokens().detach()
    made[0](x)
    CHANGES[case](made, x)
    adapter = made[0].router.active or ""
    outs = [one(x) for one in (made[1], made[2], made[0])]
    assert passes.count == 2
    wanted = formula([made[1], made[2], made[0]], x, adapter)
    assert all(distance(o, w) < 1e-12 for o, w in zip(outs, wanted, strict=True))


def test_a_forward_without_gradient_hands_nothing_to_one_with() -> None:
    made, x = layers(), tokens()
    with torch.no_grad():
        made[0](x)
    assert all(one(x).requires_grad for one in made)


def test_the_same_layer_twice_computes_twice(passes: Any) -> None:
    made, x = layers(), tokens().detach()
    assert torch.equal(made[0](x), made[0](x))
    assert passes.count == 2


def test_another_input_of_the_same_values_is_another_input(passes: Any) -> None:
    made, x = layers(), tokens()
    y = x.detach().clone().requires_grad_(True)
    a, b = made[0](x), made[1](y)
    assert passes.count == 2
    (a.sum() + b.sum()).backward()
    assert x.grad is not None
    assert y.grad is not None


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_normed_input_changed_in_place_gives_right_gradients(family: str, exact: None) -> None:
    """The input may be computed again in backward, from what the norm keeps: not where it is another by then."""
    base, _adapter = fast_base(family)
    attention, norm = base.model.model.layers[0].self_attn, base.model.model.layers[0].input_layernorm
    x, found = torch.randn(1, 7, 32, dtype=torch.float64, requires_grad=True), []
    A, B = attention.q_proj.updates["default"].matrices
    for alone in (False, True):
        base.router.route(None)
        y = norm(x)
        y.mul_(2)
        out = attention.q_proj.unfused(y) if alone else attention.q_proj(y)
        found.append(torch.autograd.grad(out.pow(2).sum(), (x, A, B)))
    assert all(distance(ours, wanted) < 1e-12 for ours, wanted in zip(*found, strict=True))


# --- who belongs together ---------------------------------------------------------------------------------------------


def groups_of(base: Any) -> set[tuple[str, ...]]:
    found: dict[int, list[str]] = {}
    for name, module in base.model.named_modules():
        if isinstance(module, LoRALayer) and ".0." in name:
            found.setdefault(id(module.fused_linears), []).append(name.split(".")[-1])
    return {tuple(names) for names in found.values()}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}),
        ("phi3", {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)}),
        ("cohere", {("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj",), ("down_proj",)}),
    ],
)
def test_layers_with_one_input_are_found(family: str, wanted: set[tuple[str, ...]]) -> None:
    base, _adapter = fast_base(family)
    assert groups_of(base) == wanted


def test_layers_with_and_without_bias_stay_apart(passes: Any) -> None:
    made = [*layers(bias=False), *layers(bias=True)]
    for one in made:
        one.router = made[0].router
    x = tokens()
    link_fused_linears(
        SimpleNamespace(model=nn.ModuleList(made), router=made[0].router), lambda: [one(x) for one in made]
    )  # type: ignore[arg-type]
    assert [one.fused_linears for one in made[:3]] == [made[0].fused_linears] * 3
    assert [one.fused_linears for one in made[3:]] == [made[3].fused_linears] * 3
    assert made[0].fused_linears is not made[3].fused_linears
    before = passes.count
    outs = [one(x) for one in made]
    assert passes.count == before + 2
    assert all(distance(o, w) < 1e-12 for o, w in zip(outs, formula(made, x), strict=True))
