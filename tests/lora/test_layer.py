"""The mathematics of one layer, against the plain formula."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lorasmith.errors import AdapterError
from lorasmith.lora.layer import LoRAEmbedding, LoRALayer, LowRank, SavedModule, master_dtype, plain_low_rank
from lorasmith.lora.router import Router
from lorasmith.lora.update import Update
from lorasmith.lora.variant import VARIANTS
from tests.support.families import distance

I, O, T = 5, 7, 11
WHOLE = ((0, T),)
GAPS = ((1, 4), (4, 6), (8, 10))
low_rank: Callable[..., Tensor] = LowRank.apply


def tensors(bounds: Any, dtype: torch.dtype = torch.float64, master: torch.dtype = torch.float64) -> list[Tensor]:
    """y, x, and A, B of rank 1, 2, 3, ... for each slice, all with gradient."""
    torch.manual_seed(3)
    y, x = torch.randn(T, O, dtype=dtype), torch.randn(T, I, dtype=dtype)
    AB = [torch.randn(shape, dtype=master) for r in range(1, len(bounds) + 1) for shape in ((r, I), (O, r))]
    return [t.requires_grad_(True) for t in (y, x, *AB)]


def scales(bounds: Any) -> tuple[float, ...]:
    return tuple(0.5 + i for i in range(len(bounds)))


def run(
    function: Callable[..., Tensor], bounds: Any, inputs: list[Tensor], shape: tuple[int, ...] = (T,)
) -> list[Tensor]:
    """The result and the gradients of all inputs."""
    y, x, *AB = inputs
    out = function(y.clone().view(*shape, O), x.view(*shape, I), bounds, scales(bounds), *AB)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), inputs)]


@pytest.mark.parametrize("bounds", [WHOLE, GAPS], ids=["whole", "gaps"])
def test_low_rank_equals_the_plain_formula(bounds: Any) -> None:
    inputs = tensors(bounds)
    for ours, plain in zip(run(low_rank, bounds, inputs), run(plain_low_rank, bounds, inputs), strict=True):
        assert distance(ours, plain) < 1e-14


def test_the_plain_formula_is_the_papers() -> None:
    y, x, A, B = tensors(WHOLE)
    token = plain_low_rank(y, x, WHOLE, (2.0,), A, B)[4]
    torch.testing.assert_close(token, y[4] + 2.0 * B @ (A @ x[4]))


@pytest.mark.parametrize("bounds", [WHOLE, GAPS], ids=["whole", "gaps"])
def test_gradcheck(bounds: Any) -> None:
    inputs = tensors(bounds)
    assert torch.autograd.gradcheck(lambda y, x, *AB: low_rank(y.clone(), x, bounds, scales(bounds), *AB), inputs)


def test_leading_dimensions_are_counted_together() -> None:
    inputs, bounds = tensors(GAPS), GAPS
    flat = run(low_rank, bounds, inputs)
    shaped = run(low_rank, bounds, inputs, shape=(1, T))
    assert all(torch.equal(a.view(b.shape), b) for a, b in zip(flat, shaped, strict=True))


def test_bfloat16_rounds_like_the_plain_formula_and_gradients_come_back_in_float32() -> None:
    inputs = tensors(GAPS, torch.bfloat16, torch.float32)
    for ours, plain in zip(run(low_rank, GAPS, inputs), run(plain_low_rank, GAPS, inputs), strict=True):
        assert ours.dtype == plain.dtype
        assert distance(ours, plain) < 2e-2  # bfloat16 has 8 bits: 2^-8 a rounding, and a few of them
    gradients = torch.autograd.grad(
        low_rank(inputs[0].clone(), inputs[1], GAPS, scales(GAPS), *inputs[2:]).sum(), inputs
    )
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 6


def test_no_gradient_for_x_where_none_is_needed() -> None:
    y, x, A, B = tensors(WHOLE)
    out = low_rank(y.detach().clone(), x.detach(), WHOLE, (1.0,), A, B)
    products: list[tuple[int, ...]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                products.append(tuple(result.shape))
            return result

    with Count():
        out.sum().backward()
    assert sorted(products) == sorted([(T, 1), (1, I), (1, O)]), "dh, dA and dB: no dx"
    assert (A.grad is not None, B.grad is not None, x.grad) == (True, True, None)


def test_second_derivative_is_refused_rather_than_wrong() -> None:
    y, x, A, B = tensors(WHOLE)
    out = low_rank(y.clone(), x, WHOLE, (1.0,), A, B).square().sum()
    (g,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# --- the layer --------------------------------------------------------------------------------------------------------


def layer(base: nn.Module | None = None, adapters: tuple[str, ...] = ("a",), dropout: float = 0.0) -> LoRALayer:
    """A layer with adapters of different ranks, B drawn, too."""
    torch.manual_seed(0)
    out = LoRALayer((base or nn.Linear(I, O)).double().requires_grad_(False), I, O, Router())
    for i, name in enumerate(adapters):
        out.add(name, i + 2, 0.7 + i, dropout, torch.device("cpu"))
        nn.init.normal_(out.lora_B[name].weight)
    out.router.active = adapters[0]
    return out


def by_the_book(module: LoRALayer, x: Tensor, adapter: str | None) -> Tensor:
    y: Tensor = module.base_layer(x)
    if adapter is None:
        return y
    A, B = module.updates[adapter].matrices
    return y + module.updates[adapter].scaling * (x @ A.t()) @ B.t()


@pytest.mark.parametrize("kind", [lambda: nn.Linear(I, O), lambda: nn.Linear(I, O, bias=False), lambda: Conv1D(O, I)])
@pytest.mark.parametrize("shape", [(I,), (T, I), (2, T, I), (2, 3, T, I)])
def test_layer_equals_the_formula_on_any_shape(kind: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    module, x = layer(kind()), torch.randn(shape, dtype=torch.float64)
    assert distance(module(x), by_the_book(module, x, "a")) < 1e-14


@pytest.mark.parametrize("kind", [lambda: nn.Linear(I, O), lambda: Conv1D(O, I)])
def test_gradients_through_a_layer_equal_the_formula(kind: Callable[[], nn.Module]) -> None:
    module, x = layer(kind()), torch.randn(2, T, I, dtype=torch.float64, requires_grad=True)
    wanted = [x, module.lora_A["a"].weight, module.lora_B["a"].weight]
    ours = torch.autograd.grad(module(x * 2).pow(3).sum(), wanted)
    plain = torch.autograd.grad(by_the_book(module, x * 2, "a").pow(3).sum(), wanted)
    assert all(distance(a, b) < 1e-13 for a, b in zip(ours, plain, strict=True))


MIXED = (("a", 0, 3), (None, 3, 4), ("b", 4, 9), ("a", 9, 11))


@pytest.mark.parametrize("stacked", [False, True], ids=["slices", "stacked mask"])
def test_slices_of_several_adapters_equal_each_alone(stacked: bool) -> None:
    module, x = layer(adapters=("a", "b", "c")), torch.randn(1, T, I, dtype=torch.float64)
    module.router.route(MIXED, stacked=stacked)
    with torch.no_grad():
        y = module(x)
        for name, start, end in MIXED:
            assert distance(y[:, start:end], by_the_book(module, x[:, start:end], name)) < 1e-14


def test_stacked_mask_and_slices_agree_in_bfloat16() -> None:
    module = layer(adapters=("a", "b")).bfloat16()
    x = torch.randn(1, T, I, dtype=torch.bfloat16)
    with torch.no_grad():
        module.router.route(MIXED)
        slices = module(x)
        module.router.route(MIXED, stacked=True)
        assert distance(module(x), slices) < 2e-2  # the scaling is rounded into B in one of them


def test_gradients_of_mixed_slices_equal_the_formula() -> None:
    module, x = layer(adapters=("a", "b")), torch.randn(1, T, I, dtype=torch.float64, requires_grad=True)
    module.router.route(MIXED)
    wanted = [x, *(store[n].weight for n in ("a", "b") for store in (module.lora_A, module.lora_B))]
    ours = torch.autograd.grad(module(x).pow(2).sum(), wanted)
    plain = torch.cat([by_the_book(module, x[:, start:end], name) for name, start, end in MIXED], dim=1)
    assert all(
        distance(a, b) < 1e-13 for a, b in zip(ours, torch.autograd.grad(plain.pow(2).sum(), wanted), strict=True)
    )


def test_a_route_for_another_row_is_noticed() -> None:
    module = layer(adapters=("a", "b"))
    module.router.route(MIXED)
    with pytest.raises(AssertionError, match="routed for 11 tokens, called with 12"):
        module(torch.randn(12, I, dtype=torch.float64))


def test_dropout_falls_on_the_update_alone_and_only_in_training() -> None:
    module, x = layer(dropout=0.5), torch.ones(1, T, I, dtype=torch.float64)
    y = module.base_layer(x)
    update = by_the_book(module.eval(), x, "a") - y
    assert torch.equal(module(x), module(x))
    module.train()
    drawn = torch.stack([module(x) - y for _ in range(4000)])
    assert not torch.equal(drawn[0], drawn[1])
    assert distance(drawn.mean(0), update) < 0.1  # the mean over draws: 4000 of them, p = 0.5
    assert drawn.abs().max() > update.abs().max() * 1.2, "kept inputs are scaled by 1 / (1 - p)"


def test_dropout_draws_for_each_adapter_of_a_mixed_row() -> None:
    module, x = layer(adapters=("a", "b"), dropout=0.9), torch.randn(1, T, I, dtype=torch.float64)
    module.router.route(MIXED)
    module.train()
    y = module(x)
    assert torch.equal(y[:, 3:4], module.base_layer(x)[:, 3:4])
    assert y.shape == (1, T, O)


@pytest.mark.parametrize("kind", [lambda: nn.Linear(I, O), lambda: nn.Linear(I, O, bias=False), lambda: Conv1D(O, I)])
def test_layer_compiles_in_one_piece(kind: Callable[[], nn.Module]) -> None:
    module, x = layer(kind()), torch.randn(1, T, I, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    ours, plain = compiled(x), module(x)
    assert distance(ours, plain) < 1e-14
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(ours.pow(2).sum(), wanted), torch.autograd.grad(plain.pow(2).sum(), wanted)
    assert all(distance(a, b) < 1e-13 for a, b in zip(*gradients, strict=True))


class Squashed(Update):
    """An invented variant; test_variant.py has more of them."""

    def forward(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x_TI, y_TO))


def test_a_compiled_layer_computes_an_invented_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "use_squash", Squashed)
    module, x = layer(), torch.randn(1, T, I, dtype=torch.float64)
    plain = module(x)
    module.updates["a"] = Squashed(module, "a", module.updates["a"].scaling)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert distance(compiled(x), torch.tanh(plain)) < 1e-14
    assert distance(compiled(x), module(x)) < 1e-14


# --- embedding, whole modules, start ----------------------------------------------------------------------------------


def test_embedding_equals_the_formula() -> None:
    table = nn.Embedding(20, O, dtype=torch.float64, padding_idx=0)
    module = LoRAEmbedding(table, Router())
    module.add("a", 3, 0.5, torch.device("cpu"))
    for p in (module.lora_embedding_A["a"], module.lora_embedding_B["a"]):
        nn.init.normal_(p)
    ids = torch.tensor([[4, 0, 9], [19, 4, 4]])
    module.router.route((("a", 0, 2), (None, 2, 4), ("a", 4, 6)))
    y = module(ids)
    W = table.weight + 0.5 * (module.lora_embedding_B["a"] @ module.lora_embedding_A["a"]).t()
    torch.testing.assert_close(y.view(-1, O)[[0, 1, 4, 5]], W[[4, 0, 4, 4]])
    assert torch.equal(y.view(-1, O)[2:4], table(ids).view(-1, O)[2:4])


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_whole_module_is_taken_by_slices(shape: tuple[int, ...]) -> None:
    for original, x in (
        (nn.LayerNorm(I), torch.randn(*shape, I)),
        (nn.Linear(I, O, bias=False), torch.randn(*shape, I)),
        (nn.Embedding(9, O), torch.randint(9, shape)),
    ):
        module = SavedModule(copy.deepcopy(original), Router())
        module.add("a").weight.data.add_(1)
        module.router.route((("a", 0, 2), (None, 2, 6)))
        y, width = module(x), module(x).shape[-1]
        assert torch.equal(y.reshape(6, width)[2:], original(x).reshape(6, width)[2:])
        changed = module.modules_to_save["a"](x).reshape(6, width)
        torch.testing.assert_close(y.reshape(6, width)[:2], changed[:2])
        assert y.shape == (*x.shape[:-1], width) if x.is_floating_point() else (*x.shape, width)


class Block(nn.Module):
    """Called with keywords, gives a tuple, and has a mark that its caller looks at: as attention does."""

    kind = "sliding"

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(I, I, dtype=torch.bfloat16)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.proj(hidden_states), None


def test_a_whole_block_is_called_as_it_is_called_without_us() -> None:
    module, x = SavedModule(Block(), Router()), torch.randn(2, 3, I).bfloat16()
    module.add("a")
    module.router.active = "a"
    assert module.takes_several_inputs
    assert not SavedModule(nn.Linear(I, O), Router()).takes_several_inputs
    y, nothing = module(hidden_states=x, mask=None)
    assert nothing is None
    assert (y.dtype, y.shape) == (torch.bfloat16, x.shape)
    assert torch.equal(y, module.original_module(x)[0])
    y.sum().backward()
    assert module.modules_to_save["a"].proj.weight.grad is not None
    assert module.kind == "sliding", "what it does not have, the block has"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = module.no_such_thing
    assert copy.deepcopy(module).kind == "sliding"


def test_a_whole_block_takes_no_row_of_several_adapters() -> None:
    module, x = SavedModule(Block(), Router()), torch.randn(1, 6, I).bfloat16()
    module.add("a")
    module.router.route((("a", 0, 2), (None, 2, 6)))
    with pytest.raises(
        AdapterError, match="a Block that is trained in full cannot compute several adapters in one batch"
    ):
        module(hidden_states=x)
    module.router.route((("a", 0, 6),))
    assert module(hidden_states=x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("base", "master"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_adapters_are_kept_in_float32_at_least(base: str, master: str) -> None:
    module = nn.Linear(2, 2).to(getattr(torch, base))
    assert master_dtype(module) == getattr(torch, master)
    assert SavedModule(module, Router()).add("a").weight.dtype == getattr(torch, master)


# -- autocast -----------------------------------------------------------------------------------------------------


def autocast_layer(router: Router) -> LoRALayer:
    torch.manual_seed(4)
    layer = LoRALayer(nn.Linear(64, 48).requires_grad_(False), 64, 48, router)
    for name, r in (("a", 4), ("b", 8)):
        layer.add(name, r, 0.7, 0.0, torch.device("cpu"))
        for matrix in layer.updates[name].matrices:
            nn.init.normal_(matrix, std=0.2)
    return layer


@pytest.mark.parametrize("slices", [None, [("a", 0, 9), (None, 9, 15), ("b", 15, 24)]], ids=["one", "several"])
def test_under_autocast_a_layer_computes_as_a_model_in_bfloat16(slices: Any) -> None:
    router = Router()
    layer = autocast_layer(router)
    router.active = "a"
    router.route(slices)
    x = torch.randn(2, 12, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    found = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    half = copy.deepcopy(layer)
    half.base_layer.bfloat16()
    half.zero_grad()
    short = x.detach().bfloat16().requires_grad_(True)
    z = half.unfused(short)
    z.float().square().sum().backward()
    wanted = [short.grad, *(p.grad for p in half.parameters() if p.grad is not None)]
    assert torch.equal(y, z)
    assert len(found) == (3 if slices is None else 5)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert distance(found[0], wanted[0]) < 0.01  # of x: its two parts are added in float32 instead of bfloat16
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1:], wanted[1:], strict=True))


def test_under_autocast_decoding_with_several_adapters_equals_training() -> None:
    router = Router()
    layer = autocast_layer(router)
    x, slices = torch.randn(6, 64), [("a", 0, 3), ("b", 3, 6)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        router.route(slices, stacked=True)
        stacked = layer(x)
        router.route(slices)
        apart = layer(x)
    assert stacked.dtype == apart.dtype == torch.bfloat16
    assert distance(stacked, apart) < 0.01  # the ranks are summed in another order


def test_under_autocast_layers_are_not_fused(passes: Any) -> None:
    router = Router()
    layer = autocast_layer(router)
    router.active = "a"
    layer(torch.randn(40, 64))
    assert passes.count == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(40, 64))
    assert passes.count == 1
