"""Hidden states of a row: mixed adapters, checkpointing, and no wait for a device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import inject
from lorasmith.lora.router import Slice
from lorasmith.model import attention
from lorasmith.model.forward import hidden
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.row import Row
from tests.support.families import (
    CONFIGS,
    MAIN,
    PADDED,
    adapted,
    distance,
    examples,
    gradients,
    logits_of,
    one_row,
    stir,
)


def with_adapters(row: Row, *names: str | None) -> Row:
    """The same row, each example with its own adapter."""
    return replace(row, slots=tuple(Slice(n, s.start, s.end) for n, s in zip(names, row.spans, strict=True)))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", MAIN)
def test_a_row_of_several_adapters_equals_each_example_alone(family: str) -> None:
    base, _first = adapted(family, modules_to_save=("lm_head",))
    stir(inject(base.model, LoraConfig(r=3, use_rslora=True), base.router, "second"), seed=2)
    batch, names = examples((5, 9, 3, 7)), ("default", None, "second", "default")
    row = with_adapters(one_row(batch), *names)
    states, losses = hidden(base, row), token_losses(base, row).split(row.counts)
    for example, name, span, loss in zip(batch, names, row.spans, losses, strict=True):
        alone = one_row([example], name)
        assert distance(states[span.start : span.end], hidden(base, alone)) < 1e-12
        assert distance(loss, token_losses(base, alone)) < 1e-12
    others = hidden(base, with_adapters(one_row(batch), None, None, "default", "second"))
    assert not any(
        torch.allclose(others[s.start : s.end], states[s.start : s.end]) for s in (row.spans[0], *row.spans[2:])
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_gradients_of_a_mixed_row_reach_each_adapter_from_its_own_tokens(family: str) -> None:
    base, first = adapted(family, modules_to_save=("lm_head",))
    second = inject(base.model, LoraConfig(r=3), base.router, "second")
    stir(second, seed=2)
    row = one_row(examples((5, 9)))
    loss_sum(base, with_adapters(row, "default", "second")).backward()
    mixed = gradients(first) | {"second " + key: g for key, g in gradients(second).items()}
    for adapter, prefix, names in ((first, "", ("default", None)), (second, "second ", (None, "second"))):
        loss_sum(base, with_adapters(row, *names)).backward()
        alone = gradients(adapter)
        assert all(distance(mixed[prefix + key], g) < 1e-11 for key, g in alone.items())


def test_an_adapter_that_no_token_uses_gets_no_gradient() -> None:
    base, first = adapted("llama", modules_to_save=("lm_head",))
    second = inject(base.model, LoraConfig(modules_to_save=("lm_head",)), base.router, "second")
    loss_sum(base, one_row(examples(), "second")).backward()
    assert all(p.grad is None for p in first.parameters.values())
    assert all(p.grad is not None for p in second.parameters.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(
    family: str, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = adapted(family, modules_to_save=("lm_head",))
    row, calls, attend = one_row(examples()), [], attention._by_hand
    monkeypatch.setattr(attention, "_by_hand", lambda *a: calls.append(1) or attend(*a))
    loss_sum(base, row).backward()
    wanted, once = gradients(adapter), len(calls)
    base.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        base.model.enable_input_require_grads()
    loss_sum(base, row).backward()
    found = gradients(adapter)
    for key, gradient in wanted.items():  # a processor may round alike products apart, by where their tensors lie
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12 * float(gradient.abs().max()))
    assert once == (0 if family in PADDED else 2)
    assert len(calls) == 3 * once, "each layer is attended to again in backward"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_checkpointing_a_mixed_row_recomputes_each_example_with_its_adapter(family: str) -> None:
    base, first = adapted(family)
    second = inject(base.model, LoraConfig(r=3), base.router, "second")
    stir(second, seed=2)
    row = with_adapters(one_row(examples((5, 9))), "default", "second")
    loss_sum(base, row).backward()
    wanted = gradients(first), gradients(second)
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_sum(base, row).backward()
    for found, plain in zip((gradients(first), gradients(second)), wanted, strict=True):
        assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("family", CONFIGS)
def test_train_equals_eval_bit_for_bit(family: str) -> None:
    base, _adapter = adapted(family, torch.float32)
    row = one_row(examples())
    training = hidden(base, row)
    base.model.eval()
    assert torch.equal(hidden(base, row), training)
    assert logits_of(base).isfinite().all()


# --- no wait for a device ---------------------------------------------------------------------------------------------


def _tensors(indices: Any) -> list[torch.Tensor]:
    return [t for t in (indices if isinstance(indices, list | tuple) else []) if isinstance(t, torch.Tensor)]


class NoWaiting(TorchDispatchMode):
    """Fails at what would make a CUDA step wait for its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        waits = any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))
        by_mask = "aten.index" in str(func) and any(t.dtype == torch.bool for t in _tensors(args[1]))
        if waits or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [f for f in MAIN if f not in PADDED])
def test_a_packed_training_row_waits_for_nothing(family: str) -> None:
    base, _adapter = adapted(family, dtype=torch.float32, lora_dropout=0.1, modules_to_save=("lm_head",))
    row = one_row(examples())
    with NoWaiting() as mode:
        loss_sum(base, row).backward()
    assert mode.calls > 200


@pytest.mark.parametrize("wait", [lambda t: t.item(), lambda t: t[t > 0], lambda t: bool(t.any())])
def test_a_wait_would_be_noticed(wait: Any) -> None:
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        wait(torch.ones(1))
