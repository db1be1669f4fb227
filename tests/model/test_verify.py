"""What runs fast is verified on the model itself: a wrong part is found, named and left plain, the others stay on."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.lora.fused import linears
from lorasmith.lora.layer import LoRALayer
from lorasmith.model import attention, forward, head
from lorasmith.model import row as row_module
from lorasmith.model.base import Base
from lorasmith.model.fast import modules
from lorasmith.model.fast.modules import FastModule
from lorasmith.model.head import loss_sum
from lorasmith.model.verify import enable_fast_parts, fast_candidates, saved_tensors, use_fast_parts
from tests.support.families import CONFIGS, PADDED, adapted, distance, examples, far_apart, gradients, one_row
from tests.support.fast_base import FAST, IDS, PLAIN, fast_base, plain_base

ALL = frozenset({"MLPs", "attention", "head", "linear layers", "norms", "prefix", "rotary"})
ROW = one_row(examples())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [f for f in FAST if f != "phi3"])
def test_every_part_runs_fast_in_a_known_family(family: str, dtype: torch.dtype) -> None:
    base, _adapter = fast_base(family, dtype)
    assert base.fast_parts == ALL
    assert base.why["fast"] == "MLPs, attention, head, linear layers, norms, prefix, rotary"
    assert "plain" not in base.why
    assert base.router.fused
    assert not any(m.plain for m in base.model.modules() if isinstance(m, FastModule))


@pytest.mark.parametrize("family", FAST)
def test_every_part_runs_in_bfloat16(family: str) -> None:
    """Whether all are taken is up to rounding, which is large in so small a model; none may raise."""
    base, adapter = fast_base(family, torch.bfloat16)
    assert base.fast_parts >= {"MLPs", "head", "linear layers", "norms", "prefix"}
    for part in sorted(fast_candidates(base)):
        use_fast_parts(base, frozenset({part}))
        assert step(base, adapter)["loss"].isfinite(), part


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("phi3", ALL - {"rotary"}),  # its q, k and v are one layer
        ("gpt2", {"attention", "head", "linear layers", "prefix"}),
        ("bloom", {"head", "linear layers"}),
        ("gemma2", {"MLPs", "head", "linear layers", "norms"}),
    ],
)
def test_other_families_run_fast_in_the_parts_that_they_have(family: str, parts: frozenset[str]) -> None:
    base, _adapter = fast_base(family)
    assert base.fast_parts == parts == fast_candidates(base)
    assert "plain" not in base.why


@pytest.mark.parametrize("family", CONFIGS)
def test_a_part_that_does_not_fit_is_left_plain_and_never_raises(family: str) -> None:
    base, adapter = fast_base(family, torch.float32)
    fitting = base.fast_parts
    assert base.why["fast"] == ", ".join(sorted(fitting))
    assert ("plain" in base.why) == (fitting != fast_candidates(base))
    found = step(base, adapter)
    use_fast_parts(base, PLAIN)
    assert not far_apart(found, step(base, adapter), 1e-3)  # float32, and what Adam does not see


def step(base: Base, adapter: Any) -> dict[str, Tensor]:
    loss = loss_sum(base, ROW)
    loss.backward()
    return gradients(adapter) | {"loss": loss.detach()}


# --- each part made wrong ---------------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def wrong_rotary(patch: pytest.MonkeyPatch) -> None:
    right = modules._rotated
    patch.setattr(modules, "_rotated", lambda x, cos, sin, sign: right(x, cos, sin, -sign))


def wrong_rotary_backward(patch: pytest.MonkeyPatch) -> None:
    right = modules._rotated
    patch.setattr(modules, "_rotated", lambda x, cos, sin, sign: right(x, cos, sin, -1))


def wrong_norm(patch: pytest.MonkeyPatch) -> None:
    right = modules._RMSNorm.apply
    patch.setattr(modules._RMSNorm, "apply", lambda x, w, eps, wide: right(x, w, eps + 0.1, wide))


def wrong_mlp(patch: pytest.MonkeyPatch) -> None:
    right = modules.activated
    patch.setattr(modules, "activated", lambda gate, gelu: right(gate, not gelu))


def wrong_attention(patch: pytest.MonkeyPatch) -> None:
    right = attention._by_hand
    patch.setattr(attention, "_by_hand", lambda q, k, v, groups, scale, *w: right(q, k, v, groups, scale * 1.1, *w))


def wrong_head(patch: pytest.MonkeyPatch) -> None:
    right = head._FrozenHead.apply
    patch.setattr(head._FrozenHead, "apply", lambda *args: right(*args) * 1.1)


def wrong_linear(patch: pytest.MonkeyPatch) -> None:
    right = linears.product
    patch.setattr(linears, "product", lambda x, w, bias=None: right(x, w, bias).mul_(1.01))


def wrong_linear_backward(patch: pytest.MonkeyPatch) -> None:
    right = linears.sum_of_products
    patch.setattr(linears, "sum_of_products", lambda xs, ws: right(xs, ws).mul_(1.1))


def wrong_prefix(patch: pytest.MonkeyPatch) -> None:
    """Positions of what follows a prefix begin at 0 again."""
    right = forward.flatten

    def flatten(*args: Any) -> row_module.Row:
        row = right(*args)
        starts = torch.tensor([span.start for span in row.spans for _place in range(span.length)])
        return replace(row, position_T=torch.arange(row.tokens) - starts)

    patch.setattr(forward, "flatten", flatten)


def raising_rotary(patch: pytest.MonkeyPatch) -> None:
    """As where only a part of each head is rotated: the shapes do not fit."""
    right = modules._rotated
    patch.setattr(modules, "_rotated", lambda x, cos, sin, sign: right(x, cos[..., :4], sin[..., :4], sign))


def infinite_mlp(patch: pytest.MonkeyPatch) -> None:
    right = modules.activated
    patch.setattr(modules, "activated", lambda gate, gelu: right(gate, gelu) * float("nan"))


WRONG: dict[str, tuple[str, Break]] = {
    "rotary": ("rotary", wrong_rotary),
    "rotary, backward": ("rotary", wrong_rotary_backward),
    "rotary, raising": ("rotary", raising_rotary),
    "norms": ("norms", wrong_norm),
    "MLPs": ("MLPs", wrong_mlp),
    "MLPs, not a number": ("MLPs", infinite_mlp),
    "attention": ("attention", wrong_attention),
    "head": ("head", wrong_head),
    "linear layers": ("linear layers", wrong_linear),
    "linear layers, backward": ("linear layers", wrong_linear_backward),
    "prefix": ("prefix", wrong_prefix),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_part_is_found_named_and_left_plain(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, make_wrong = WRONG[case]
    base, adapter = plain_base("llama", dtype)
    make_wrong(monkeypatch)
    enable_fast_parts(base, "default", IDS)
    assert base.fast_parts == ALL - {part}
    assert base.why["plain"].startswith(f"{part}: ")
    assert not any(f"{other}: " in base.why["plain"] for other in ALL - {part})
    assert part not in base.why["fast"]
    found = step(base, adapter)
    use_fast_parts(base, PLAIN)
    assert not far_apart(found, step(base, adapter), 1e-5 if dtype == torch.float64 else 1e-4)


def test_every_part_is_made_wrong_above() -> None:
    assert {part for part, _make_wrong in WRONG.values()} == ALL


def test_the_reason_has_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _adapter = plain_base("llama", torch.float32)
    wrong_attention(monkeypatch)
    enable_fast_parts(base, "default", IDS)
    assert re.fullmatch(r"attention: loss differs by \S+e-\d\d, gradients by \S+e-\d\d", base.why["plain"])


def test_several_wrong_parts_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _adapter = plain_base("qwen3", torch.float32)
    for make_wrong in (wrong_mlp, wrong_head, wrong_norm):
        make_wrong(monkeypatch)
    enable_fast_parts(base, "default", IDS)
    assert base.fast_parts == ALL - {"MLPs", "head", "norms"}
    assert [reason.split(": ")[0] for reason in base.why["plain"].split("; ")] == ["MLPs", "head", "norms"]


def test_parts_that_are_right_alone_and_not_together_all_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is wrong only where the head is fast, too."""
    base, adapter = plain_base("llama", torch.float32)
    right = attention._by_hand

    def by_hand(q: Tensor, k: Tensor, v: Tensor, groups: Any, scale: float, *window: Any) -> Tensor:
        return right(q, k, v, groups, scale * (1.5 if "head" in base.fast_parts else 1), *window)

    monkeypatch.setattr(attention, "_by_hand", by_hand)
    enable_fast_parts(base, "default", IDS)
    assert base.fast_parts == PLAIN
    assert base.why["fast"] == "none"
    assert re.search(r"loss differs by \S+, gradients by \S+", base.why["plain"])
    assert step(base, adapter)["loss"].isfinite()


# --- what the trial leaves behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"lora_dropout": 0.5}),
        ("qwen2", {"bias": "all"}),
        ("llama", {"modules_to_save": ("lm_head", "norm")}),
        ("bloom", {}),
    ],
)
def test_nothing_but_speed_is_changed(family: str, options: dict[str, Any], training: bool) -> None:
    base, adapter = plain_base(family, torch.float32, **options)
    base.model.train(training)
    modes = {name: module.training for name, module in base.model.named_modules()}
    tensors = {key: value.clone() for key, value in base.model.state_dict().items()}
    trained = {key: id(p) for key, p in adapter.parameters.items()}
    asks = {name: p.requires_grad for name, p in base.model.named_parameters()}
    state = torch.get_rng_state()
    enable_fast_parts(base, "default", IDS)
    assert torch.equal(torch.get_rng_state(), state), "the training draws the numbers that it would draw"
    assert {name: module.training for name, module in base.model.named_modules()} == modes
    assert all(torch.equal(value, tensors[key]) for key, value in base.model.state_dict().items())
    assert {key: id(p) for key, p in adapter.parameters.items()} == trained
    assert {name: p.requires_grad for name, p in base.model.named_parameters()} == asks
    assert all(p.grad is None for p in base.model.parameters())
    assert not any(m._forward_pre_hooks for m in base.model.modules() if isinstance(m, LoRALayer))


def test_a_failure_inside_restores_the_adapter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = plain_base("llama", torch.float32)
    before = {key: p.detach().clone() for key, p in adapter.parameters.items()}
    monkeypatch.setattr("lorasmith.model.verify.fast_candidates", lambda base: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        enable_fast_parts(base, "default", IDS)
    assert all(torch.equal(p, before[key]) for key, p in adapter.parameters.items())
    assert base.model.training


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 15, 23, 24, 25, 100])
def test_few_tokens_are_enough_to_try_with(tokens: int, family: str) -> None:
    base, _adapter = plain_base(family, torch.float32)
    enable_fast_parts(base, "default", (IDS * 5)[:tokens])
    assert base.fast_parts == (ALL if family == "llama" else {"head", "linear layers"})


def test_a_text_that_repeats_itself_is_enough_to_try_with() -> None:
    base, _adapter = plain_base("llama", torch.float32)
    enable_fast_parts(base, "default", [7] * 24)
    assert base.fast_parts == ALL


def test_a_fresh_adapter_is_stirred_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """At B = 0, a wrong gradient of A could not be seen."""
    base, adapter = plain_base("llama", torch.float32)
    with torch.no_grad():
        for key, p in adapter.parameters.items():
            if "lora_B" in key:
                p.zero_()
    right = linears.AdaptedLinear.backward

    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g * 2 if g.dim() == 2 and len(g) == 4 else g for g in right(ctx, *dy))

    monkeypatch.setattr(linears.AdaptedLinear, "backward", staticmethod(backward))
    enable_fast_parts(base, "default", IDS)
    assert base.fast_parts == ALL - {"linear layers"}


# --- the switch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", sorted(ALL))
def test_one_part_alone_is_switched(part: str) -> None:
    base, _adapter = fast_base("llama")
    use_fast_parts(base, frozenset({part}))
    assert base.fast_parts == {part}
    assert base.router.fused == (part == "linear layers")
    assert {m.part for m in base.model.modules() if isinstance(m, FastModule) and not m.plain} == {part} & {
        "norms",
        "MLPs",
        "rotary",
    }


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", sorted({"llama", "gemma3_text", "gpt2", *PADDED}))
def test_the_plain_path_is_that_of_an_untouched_model(family: str) -> None:
    """With all parts off, loss and gradients are those of a base that nothing was recognized in."""
    base, adapter = fast_base(family)
    use_fast_parts(base, PLAIN)
    untouched, own = adapted(family)
    untouched.fast_parts, untouched.router.fused = PLAIN, False
    found, wanted = step(base, adapter), step(untouched, own)
    assert distance(found["loss"], wanted["loss"]) < 1e-13
    assert not far_apart(found, wanted, 1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_memory_of_a_longer_row_follows_from_the_trial(family: str) -> None:
    base, _adapter = fast_base(family, torch.float32)
    row = one_row(examples((50, 40, 45, 38)))
    with saved_tensors(base.model) as found:
        loss_sum(base, row)
    predicted = row.tokens * base.saved_bytes_per_token
    assert predicted == pytest.approx(sum(found.values()), rel=0.1)
