"""Layers with one input computed as one: each gets what it would alone, and the formula's gradients."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.lora.fused.linears import fuse_weights
from tests.support.families import distance
from tests.support.fused_layers import RANKS, WIDTHS, I, T, formula, layers, tokens, trained, with_gradients

# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(T,), (1, T), (2, 3, 4)])
def test_each_layer_gets_what_it_would_alone(bias: bool, shape: tuple[int, ...], passes: Any) -> None:
    made, x = layers(bias), tokens(*shape)
    inputs = [x, *trained(made)]
    ours = with_gradients([one(x) for one in made], inputs)
    assert passes.count == 1
    for wanted in (with_gradients([one.unfused(x) for one in made], inputs), with_gradients(formula(made, x), inputs)):
        assert all(o.shape == w.shape and distance(o, w) < 1e-12 for o, w in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool) -> None:
    made, x = layers(bias), tokens(3)

    def all_of_them(x: Tensor, *AB: Tensor) -> list[Tensor]:
        made[0].router.route(None)
        return [one(x) for one in made]

    assert torch.autograd.gradcheck(all_of_them, [x, *trained(made)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_b_zero_no_bit_changes(dtype: torch.dtype) -> None:
    """Law 1: a fresh adapter leaves the product as it is."""
    made, x = layers(bias=True, dtype=dtype), tokens(dtype=dtype)
    for one in made:
        nn.init.zeros_(one.lora_B["a"].weight)
    ours = [one(x) for one in made]
    weight, bias = fuse_weights([one.base_layer for one in made])
    whole = nn.functional.linear(x, weight, bias).split(WIDTHS, dim=-1)
    assert all(torch.equal(o, w) for o, w in zip(ours, whole, strict=True))


def test_bfloat16_rounds_like_the_formula_and_gradients_come_back_in_float32() -> None:
    made, x = layers(dtype=torch.bfloat16), tokens(dtype=torch.bfloat16)
    inputs = [x, *trained(made)]
    ours = with_gradients([one(x) for one in made], inputs)
    for o, w in zip(ours, with_gradients(formula(made, x), inputs), strict=True):
        assert o.dtype == w.dtype
        assert distance(o, w) < 2e-2  # bfloat16 has 8 bits: 2^-8 a rounding, and a few of them
    assert [g.dtype for g in ours[3:]] == [torch.bfloat16] + [torch.float32] * 6


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_outputs_that_nothing_follows_add_nothing(used: tuple[int, ...]) -> None:
    made, x = layers(), tokens()
    some = [made[i] for i in used]
    inputs = [x, *trained(some)]
    outs = [one(x) for one in made]
    ours = with_gradients([outs[i] for i in used], inputs)
    wanted = with_gradients(formula(some, x), inputs)
    assert all(distance(o, w) < 1e-12 for o, w in zip(ours, wanted, strict=True))


def test_second_derivative_is_refused_rather_than_wrong() -> None:
    made, x = layers(), tokens()
    (g,) = torch.autograd.grad(made[0](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# --- what is computed -------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The shapes [M, K] x [K, N] of all products of matrices, as (M, K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.shapes.append((*a.shape, b.shape[1]))
        return func(*args, **(kwargs or {}))


O, K = sum(WIDTHS), sum(RANKS)
DH, DA, DB = (T, O, K), (K, T, I), (K, T, O)
DX = [*((T, width, I) for width in WIDTHS), (T, K, I)]


@pytest.mark.parametrize("below", [True, False], ids=["something below is trained", "the lowest"])
def test_the_products_of_a_step(below: bool) -> None:
    """One product with W for all layers, and no gradient of W: that would be [O, T] x [T, I]."""
    made, x = layers(), tokens().requires_grad_(below)
    with Products() as forward:
        outs = [one(x) for one in made]
    assert sorted(forward.shapes) == sorted([(T, I, O), (T, I, K), (T, K, O)])
    with Products() as backward:
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    assert sorted(backward.shapes) == sorted([DH, DA, DB, *(DX if below else [])])
    assert (x.grad is not None) == below
    assert all(one.base_layer.weight.grad is None for one in made)


def test_the_input_goes_when_all_have_their_output() -> None:
    made, x = layers(), tokens().detach()
    seen = weakref.ref(x)
    outs = [one(x) for one in made[:2]]
    assert seen() is not None
    with torch.no_grad():
        outs += [one(x) for one in made]
    del x, outs
    assert seen() is None


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_weights_become_parts_of_one_buffer_and_keep_their_values(bias: bool) -> None:
    made = layers(bias)
    linears = [one.base_layer for one in made]
    before = [{k: v.clone() for k, v in one.state_dict().items()} for one in made]
    parameters = [p for one in linears for p in one.parameters()]
    weight, b = fuse_weights(linears)
    assert torch.equal(weight, torch.cat([one.weight for one in linears]))
    assert (b is not None) == bias
    assert b is None or torch.equal(b, torch.cat([one.bias for one in linears]))
    ends = [one.weight.data_ptr() + one.weight.numel() * one.weight.element_size() for one in linears]
    assert [one.weight.data_ptr() for one in linears] == [weight.data_ptr(), *ends[:-1]]
    assert all(p is q for p, q in zip(parameters, (p for one in linears for p in one.parameters()), strict=True))
    for one, was in zip(made, before, strict=True):
        assert one.state_dict().keys() == was.keys()
        assert all(torch.equal(value, was[key]) for key, value in one.state_dict().items())


def test_weights_are_stacked_once() -> None:
    linears = [one.base_layer for one in layers(bias=True)]
    places = [t.data_ptr() for t in fuse_weights(linears) if t is not None]
    assert [t.data_ptr() for t in fuse_weights(linears) if t is not None] == places


def test_weights_in_one_buffer_in_another_order_are_stacked_again() -> None:
    linears = [one.base_layer for one in layers()]
    wanted = torch.cat([linears[i].weight for i in (2, 0)])
    fuse_weights(linears)
    assert torch.equal(fuse_weights([linears[2], linears[0]])[0], wanted)
    assert torch.equal(fuse_weights([linears[2], linears[0]])[0], wanted)


def test_a_copy_has_a_buffer_of_its_own() -> None:
    made, x = layers(bias=True), tokens()
    wanted = [one(x).detach() for one in made]
    twin = copy.deepcopy(nn.ModuleList(made))
    with torch.no_grad():
        for one in made:
            one.base_layer.weight.zero_()
    assert all(torch.equal(one(x), w) for one, w in zip(twin, wanted, strict=True))
    assert fuse_weights([one.base_layer for one in twin])[0].any()


def test_loaded_weights_are_used() -> None:
    made, x = layers(), tokens()
    [one(x) for one in made]
    for one in made:
        one.base_layer.load_state_dict({"weight": torch.ones_like(one.base_layer.weight)})
    made[0].router.route(None)
    assert all(distance(one(x), w) < 1e-14 for one, w in zip(made, formula(made, x), strict=True))
