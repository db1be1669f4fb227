"""Fast modules compute what the family's own do; a training with them comes to the same adapter."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorasmith.config.training import TrainingConfig
from lorasmith.lora.fused.products import share_memory
from lorasmith.model.base import Base
from lorasmith.model.fast import modules
from lorasmith.model.fast.modules import FastGatedMLP, FastModule, FastRMSNorm
from lorasmith.model.fast.recognize import recognize_modules
from lorasmith.model.forward import row_of
from lorasmith.model.head import loss_sum
from lorasmith.model.row import Example, Step
from lorasmith.model.verify import fast_candidates, use_fast_parts
from lorasmith.training.distributed import World
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import make_optimizer
from lorasmith.training.step import train_step
from tests.support.families import (
    CONFIGS,
    WORDS,
    adapted,
    distance,
    example,
    examples,
    far_apart,
    gradients,
    one_row,
)
from tests.support.fast_base import FAST, IDS, PLAIN, fast_base, output_and_gradient, plain_base

ROW = one_row(examples((5, 9, 3, 12)))


def step(base: Base, adapter: Any, parts: frozenset[str]) -> dict[str, Tensor]:
    """Loss and gradients of one row with these parts fast."""
    use_fast_parts(base, parts)
    loss = loss_sum(base, ROW)
    loss.backward()
    return gradients(adapter) | {"loss": loss.detach()}


# --- each module ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAST)
def test_norms_and_mlps_equal_the_familys_own(family: str) -> None:
    base, _adapter = plain_base(family)
    modules = [m for m in base.model.modules() if isinstance(m, FastRMSNorm | FastGatedMLP)]
    assert len(modules) >= 3 * base.model.config.num_hidden_layers + 1, "two norms and an MLP a layer, and a last norm"
    for module in modules:
        x = torch.randn(2, 5, next(module.parameters()).shape[-1], dtype=torch.float64)
        base.router.route(None)
        wanted = output_and_gradient(module, x)
        module.plain = False
        found = output_and_gradient(module, x)
        assert all(distance(f, w) < 1e-12 for f, w in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAST)
def test_each_part_changes_no_loss_and_no_gradient(family: str) -> None:
    base, adapter = fast_base(family)
    wanted = step(base, adapter, PLAIN)
    for parts in (*(frozenset({part}) for part in sorted(fast_candidates(base))), fast_candidates(base)):
        assert not far_apart(step(base, adapter, parts), wanted, 1e-11), parts


@pytest.mark.parametrize("family", FAST)
def test_names_and_classes_stay(family: str) -> None:
    plain, _plain_adapter = adapted(family) if family in CONFIGS else plain_base(family)
    base, _adapter = fast_base(family)
    ours, theirs = base.model.state_dict(), plain.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for (name, module), (same, original) in zip(base.model.named_modules(), plain.model.named_modules(), strict=True):
        assert name == same
        assert isinstance(module, next(c for c in type(original).__mro__ if not issubclass(c, FastModule)))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAST)
def test_a_deep_copy_is_as_fast_and_another(family: str) -> None:
    base, adapter = fast_base(family)
    wanted = step(base, adapter, fast_candidates(base))
    twin = copy.deepcopy(base)
    assert [type(m) for m in twin.model.modules()] == [type(m) for m in base.model.modules()]
    with torch.no_grad():
        for p in base.model.parameters():
            p.zero_()
    assert not far_apart(step(twin, twin.adapters["default"], fast_candidates(twin)), wanted, 1e-13)


@pytest.mark.parametrize("name", ["input_layernorm", "norm"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_norm_that_is_trained_runs_plainly(family: str, name: str, exact: None) -> None:
    base, adapter = fast_base(family, modules_to_save=(name,))
    assert "norms" in base.fast_parts
    keys = [key for key in adapter.parameters if "lora" not in key]
    assert len(keys) == (1 if name == "norm" else 2)
    found, wanted = step(base, adapter, fast_candidates(base)), step(base, adapter, PLAIN)
    assert all(bool(found[key].any()) for key in keys)
    assert not far_apart(found, wanted, 1e-11)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"target_modules": ("lm_head", "down_proj")}, {"use_rslora": True}]
)
def test_other_adapters(options: dict[str, Any]) -> None:
    base, adapter = fast_base("qwen2", **options)
    assert not far_apart(step(base, adapter, fast_candidates(base)), step(base, adapter, PLAIN), 1e-11)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_checkpointing_gives_the_same_bits(family: str) -> None:
    base, adapter = fast_base(family, torch.float32)
    wanted = step(base, adapter, fast_candidates(base))
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = step(base, adapter, fast_candidates(base))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# --- the functions ----------------------------------------------------------------------------------------------------


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("gelu", [False, True])
def test_gated_gradcheck(gelu: bool) -> None:
    assert torch.autograd.gradcheck(lambda gate, up: modules._Gated.apply(gate, up, gelu), leaves((3, 4), (3, 4)))


def test_both_gradients_of_a_gate_are_columns_of_one_buffer() -> None:
    gate, up = leaves((1, 3, 4), (1, 3, 4))
    d_gate, d_up = torch.autograd.grad(modules._Gated.apply(gate, up, False).sum(), (gate, up))
    assert share_memory(d_gate, d_up)
    assert d_up.data_ptr() - d_gate.data_ptr() == 4 * 8


def test_rotary_equals_the_models_function() -> None:
    """Its halves of cos and sin may differ, too: the gradient is that of the map, whatever the angles."""
    (x,) = leaves((1, 5, 3, 8))
    cos, sin = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 5, 8, dtype=torch.float64)
    wanted, _key = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    found = modules._Rotary.apply(x.clone(), cos, sin)  # it writes over what it is given
    assert distance(found, wanted) < 1e-15
    direction = torch.randn_like(wanted)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, direction) for out in (found, wanted))
    assert distance(ours, theirs) < 1e-15
    assert torch.autograd.gradcheck(lambda x: modules._Rotary.apply(x.clone(), cos, sin), [x])


def test_norm_gradcheck() -> None:
    module = LlamaRMSNorm(6).double().requires_grad_(False)
    nn.init.normal_(module.weight)
    recognize_modules(module)
    module.plain = False
    assert isinstance(module, FastRMSNorm)
    assert torch.autograd.gradcheck(module, leaves((3, 6)))


@pytest.mark.parametrize(
    "call",
    [lambda x: modules._Gated.apply(x, x, False), lambda x: modules._Rotary.apply(x.clone(), x[:, :, 0], x[:, :, 0])],
)
def test_second_derivative_is_refused_rather_than_wrong(call: Callable[[Tensor], Tensor]) -> None:
    (x,) = leaves((1, 3, 2, 4))
    (g,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# --- outside a packed training row ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CONFIGS, "smollm3"])
def test_every_family_still_runs_with_what_was_recognized(family: str) -> None:
    """Its own attention, without a row: logits as those of the untouched model, bit for bit."""
    plain, _first = adapted(family) if family in CONFIGS else plain_base(family)
    base, _adapter = plain_base(family)
    for b in (plain, base):
        b.model.set_attn_implementation(b.native)
        b.router.route(None)
    with torch.no_grad():
        ids = torch.tensor([IDS])
        assert torch.equal(*(b.model(input_ids=ids, use_cache=False).logits for b in (base, plain)))


# --- fifty steps ------------------------------------------------------------------------------------------------------

BEGIN = [3 + 5 * i % 90 for i in range(11)]


def conversations(k: int) -> list[Example]:
    """Six examples of step k, four of which begin alike."""
    begun = [example(4 + (k + i) % 5, 7 * k + i) for i in range(4)]
    alone = [example(5 + (k + i) % 7, 7 * k + 4 + i) for i in range(2)]
    silent = [-100] * len(BEGIN)
    weights = [1.0] * len(BEGIN)
    return alone + [Example(BEGIN + e.ids, silent + e.targets, weights + e.weights, e.source) for e in begun]


def trained(base: Base, adapter: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Losses of all steps, and the adapter they come to."""
    parameters = FlatParameters(adapter.parameters)
    optimizer = make_optimizer(parameters, TrainingConfig())
    losses = []
    for k in range(steps):
        batch = conversations(k)
        total = sum(e.weight for e in batch)
        rows = tuple(row_of(base, part, total, "default") for part in (batch[:3], batch[3:]))
        losses.append(
            train_step(base, parameters, optimizer, Step(rows, sum(e.n_targets for e in batch)), 1.0, World()).loss
        )
    return torch.stack(losses), parameters.values.detach()


def both(family: str, dtype: torch.dtype, steps: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    base, adapter = fast_base(family, dtype)
    assert base.fast_parts >= {"MLPs", "attention", "head", "linear layers", "norms", "prefix", "rotary"}
    plain, plain_adapter = plain_base(family, dtype)
    return trained(base, adapter, steps), trained(plain, plain_adapter, steps)


TRAINED = ("llama", "qwen3", "gemma3_text")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("family", TRAINED)
def test_a_training_in_float64_comes_to_the_same_adapter(family: str, steps: int) -> None:
    """1e-10 after one step and 1e-8 after fifty, of the largest value: Adam amplifies rounding."""
    (losses, adapter), (wanted_losses, wanted) = both(family, torch.float64, steps)
    limit = 1e-10 if steps == 1 else 1e-8
    assert float(((losses - wanted_losses) / wanted_losses).abs().max()) < limit
    assert distance(adapter, wanted) < limit


@pytest.mark.parametrize("family", TRAINED)
def test_a_training_in_float32_comes_to_the_same_adapter_within_rounding(family: str) -> None:
    (losses, adapter), (wanted_losses, wanted) = both(family, torch.float32, 50)
    assert float(((losses - wanted_losses) / wanted_losses).abs().max()) < 1e-5
    start = torch.cat([p.detach().flatten() for p in plain_base(family, torch.float32)[1].parameters.values()])
    assert float((wanted - start).norm()) > 0.1, "it has learned"
    assert float((adapter - wanted).norm() / wanted.norm()) < 1e-3


def test_the_examples_of_the_trainings() -> None:
    batch = conversations(0)
    assert all(max(e.ids) < WORDS for e in batch)
    assert all(a.ids[:11] == b.ids[:11] for a, b in pairwise(batch[2:]))


def test_a_watched_layer_is_called_and_its_output_stays() -> None:
    """A forward hook sees what q_proj and gate_proj gave, also after the step."""
    base, _adapter = fast_base("llama", torch.float32)
    seen: dict[str, list[Tensor]] = {"q_proj": [], "gate_proj": []}
    layer = base.model.get_decoder().layers[0]
    row = one_row(examples((30, 40)))
    loss_sum(base, row)  # nobody watches
    for part, name in ((layer.self_attn, "q_proj"), (layer.mlp, "gate_proj")):
        note = seen[name].extend
        getattr(part, name).register_forward_hook(lambda _m, _x, y, note=note: note((y, y.detach().clone())))
    loss_sum(base, row)
    for kept, then in seen.values():
        assert torch.equal(kept, then)
