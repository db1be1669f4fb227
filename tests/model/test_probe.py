"""Law 5: nothing attends across examples; and the probe, which finds that out on the model itself."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.errors import ModelError
from lorasmith.model import attention, forward
from lorasmith.model.attention import attend
from lorasmith.model.base import Base, Head
from lorasmith.model.forward import hidden
from lorasmith.model.groups import AttentionGroup, attention_groups
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.probe import native_attention, probe
from lorasmith.model.row import Row, Span, flatten
from tests.support.families import (
    CONFIGS,
    PADDED,
    adapted,
    distance,
    example,
    far_apart,
    gradients,
    logits_of,
    one_row,
    tiny,
    tiny_base,
)

FIRST, OTHER, SECOND, THIRD, LAST = (example(n, i, learned=1) for i, n in enumerate((9, 9, 12, 5, 5)))


def states_of(base: Base, row: Row) -> list[Tensor]:
    states = hidden(base, row)
    return [states[span.start : span.end] for span in row.spans]


@pytest.mark.parametrize("family", CONFIGS)
def test_no_bit_of_an_example_follows_another_and_each_is_as_alone(family: str, exact: None) -> None:
    base, _adapter = adapted(family)
    first, second, third = states_of(base, one_row([FIRST, SECOND, THIRD]))
    other, *rest = states_of(base, one_row([OTHER, SECOND, THIRD]))
    assert torch.equal(rest[0], second)
    assert torch.equal(rest[1], third)
    assert not torch.allclose(other, first)
    for states, alone in ((first, FIRST), (second, SECOND), (third, THIRD)):
        assert distance(states, states_of(base, one_row([alone]))[0]) < 1e-12
    last = states_of(base, one_row([FIRST, SECOND, LAST]))
    assert torch.equal(last[0], first), "an earlier example follows a later one"
    assert torch.equal(last[1], second), "an earlier example follows a later one"


@pytest.mark.parametrize("family", CONFIGS)
def test_verdict_and_its_reason(family: str) -> None:
    base = tiny_base(family)
    if family in PADDED:
        assert base.layout == "padded"
        assert PADDED[family] in base.why["layout"]
        assert base.model.config._attn_implementation != attention.IMPLEMENTATION
    else:
        assert base.layout == "packed"
        assert base.why["layout"].startswith("packed: ")
        assert base.model.config._attn_implementation == attention.IMPLEMENTATION
    assert base.head.direct


def test_heads_with_a_scale_or_a_cap() -> None:
    heads = {family: tiny_base(family).head for family in ("llama", "granite", "cohere", "gemma2")}
    assert heads["llama"] == Head()
    assert heads["granite"] == Head(scale=pytest.approx(1 / 3))
    assert heads["cohere"] == Head(scale=0.25)
    assert heads["gemma2"] == Head(softcap=2.0)


def probed_again(base: Base) -> Base:
    base.model.set_attn_implementation("sdpa")
    probe(base)
    return base


def test_attention_over_the_whole_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._by_hand

    def leaky(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[AttentionGroup], *how: Any) -> Tensor:
        return right(q, k, v, attention_groups((Span(0, len(q)),), q.device), *how)

    monkeypatch.setattr(attention, "_by_hand", leaky)
    base = probed_again(tiny_base("llama"))
    assert base.layout == "padded"
    assert "attend to each other" in base.why["layout"]
    assert base.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "leak",
    [lambda t: 1e-9 * t, lambda t: 1e-9 * t.detach(), lambda t: t - t.detach()],
    ids=["small", "forward alone", "gradient alone"],
)
def test_a_leak_of_the_first_value_is_caught(leak: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._by_hand

    def leaky(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return right(q, k, v, *rest) + leak(v[:1].mean())

    monkeypatch.setattr(attention, "_by_hand", leaky)
    assert "attend to each other" in probed_again(tiny_base("llama")).why["layout"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_positions_that_run_on_are_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward.packed_inputs
    run_on = lambda base, row, kv=None: right(base, row, kv) | {"position_ids": torch.arange(row.tokens)[None]}  # noqa: E731
    monkeypatch.setattr(forward, "packed_inputs", run_on)
    base = probed_again(tiny_base(family))
    # rotary embeddings see distances alone, so positions that run on are right there; learned positions are not
    assert base.layout == ("packed" if family == "llama" else "padded")
    assert family == "llama" or "packing changes its results" in base.why["layout"]


def with_the_others(base: Base) -> None:
    """From here on, what the decoder computes for a row of a batch depends on the other rows."""

    def hook(_module: object, _inputs: object, out: Any) -> None:
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(0, keepdim=True)

    base.decoder.register_forward_hook(hook)


def test_a_model_in_which_padding_changes_the_results_computes_one_example_at_a_time(exact: None) -> None:
    base, adapter = adapted("bloom")
    with_the_others(base)
    base = probed_again(base)
    assert (base.layout, base.one_by_one) == ("padded", True)
    assert "attend to each other; padding changes its results too" in base.why["layout"]
    batch = [FIRST, SECOND, THIRD]
    total = sum(e.weight for e in batch)
    loss_sum(base, one_row(batch)).backward()
    together = gradients(adapter)
    for one in batch:
        loss_sum(base, flatten([one], total)).backward()
    assert not far_apart(together, gradients(adapter), 1e-12)
    losses = token_losses(base, one_row(batch))
    assert distance(losses, torch.cat([token_losses(base, one_row([one])) for one in batch])) < 1e-12
    base.one_by_one = False
    assert distance(losses, token_losses(base, one_row(batch))) > 1e-3


def test_padding_alone_does_not_make_it_one_by_one() -> None:
    assert not tiny_base("bloom").one_by_one
    assert not tiny_base("stablelm").one_by_one


def test_rounding_in_another_group_of_experts_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._by_hand
    noisy = lambda q, k, v, *rest: right(q, k, v, *rest) * (1 + 1e-14 * float(v[0].abs().sum().detach()))  # noqa: E731
    monkeypatch.setattr(attention, "_by_hand", noisy)
    assert probed_again(tiny_base("llama")).layout == "packed"


def test_wrong_scaling_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._by_hand
    wrong = lambda q, k, v, groups, scaling, window: right(q, k, v, groups, scaling * 1.1, window)  # noqa: E731
    monkeypatch.setattr(attention, "_by_hand", wrong)
    assert "packing changes its results" in probed_again(tiny_base("llama")).why["layout"]


def test_a_head_that_is_more_than_a_linear_layer_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("granite")
    base.model.config.logits_scaling = 5.0  # the model divides by its own copy of it
    base.model.logits_scaling = 3.0
    right = type(base.model).forward

    def more(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = right(self, *args, **kwargs)
        out.logits = out.logits + 1
        return out

    monkeypatch.setattr(type(base.model), "forward", more)
    base = probed_again(base)
    assert base.head == Head(direct=False)
    assert "more than a linear layer" in base.why["head"]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_probe_leaves_the_model_as_it_was(family: str) -> None:
    base, plain = tiny_base(family), tiny(family)
    embedding = base.model.get_input_embeddings()
    assert not embedding._forward_hooks
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), plain.parameters(), strict=True))
    assert base.router.slices is None
    assert torch.equal(logits_of(base), logits_of(plain))
    assert base.model.training


def test_native_attention_takes_the_models_own_way_and_the_active_adapter_and_gives_both_back() -> None:
    base, _adapter = adapted("llama")
    hidden(base, one_row([FIRST, SECOND], adapter=None))
    slices = base.router.slices
    with native_attention(base):
        assert base.model.config._attn_implementation == "sdpa"
        changed = base.model(input_ids=torch.tensor([[3, 4]])).logits
    assert base.router.slices == slices
    assert base.model.config._attn_implementation == attention.IMPLEMENTATION
    assert not torch.allclose(changed, logits_of(tiny("llama"), torch.tensor([[3, 4]])))


# --- attend: what it does not know it refuses -------------------------------------------------------------------------

QKV = (torch.zeros(1, 2, 3, 4),) * 3
ONE = attention_groups((Span(0, 3),), torch.device("cpu"))


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({}, "does not pass the packed row on"),
        ({"row": ONE, "softcap": 5.0}, "softcap"),
        ({"row": ONE, "s_aux": torch.ones(2)}, "s_aux"),
        ({"row": ONE, "dropout": 0.1}, "dropout"),
        ({"row": ONE, "attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask"),
    ],
)
def test_attend_refuses_what_it_does_not_compute(keywords: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        attend(torch.nn.Linear(1, 1), *QKV, **keywords)


def test_attend_takes_keywords_that_say_nothing_new() -> None:
    out, _none = attend(torch.nn.Linear(1, 1), *QKV, row=ONE, softcap=None, use_cache=False, is_causal=True)
    assert out.shape == (1, 3, 2, 4)


def test_window_and_groups_of_heads_by_the_book() -> None:
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    out, _none = attend(
        torch.nn.Linear(1, 1),
        q,
        k,
        v,
        row=attention_groups((Span(0, 2), Span(2, 6)), q.device),
        scaling=0.3,
        sliding_window=2,
    )
    for head in range(4):
        for i in range(6):
            seen = [j for j in range(6) if (i < 2) == (j < 2) and i - 2 < j <= i]  # itself and the one before
            weight = torch.softmax(k[0, head // 2, seen] @ q[0, head, i] * 0.3, dim=0)
            torch.testing.assert_close(out[0, i, head], weight @ v[0, head // 2, seen])
