"""The loss at the labels alone equals plain cross entropy of the model's own logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import inject
from lorasmith.model import head
from lorasmith.model.base import Base, Head
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.row import Example
from tests.support.families import (
    CONFIGS,
    adapted,
    distance,
    example,
    examples,
    far_apart,
    gradients,
    one_row,
    own_logits,
    tiny_base,
)

HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "trained whole": {"modules_to_save": ("lm_head",)},
    "with LoRA": {"target_modules": ("lm_head",)},
}
BATCH = examples((7, 5, 12))


def plain_loss(base: Base, batch: list[Example]) -> Tensor:
    total = sum(e.weight for e in batch)
    parts = []
    for e in batch:
        logits = own_logits(base, torch.tensor([e.ids]))[0]
        losses = F.cross_entropy(logits, torch.tensor(e.targets), reduction="none", ignore_index=-100)
        parts.append(losses @ torch.tensor(e.weights, dtype=torch.float64) / total)
    return torch.stack(parts).sum()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("chunk", [128, 3])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "cohere", "gpt2", "bloom"])
def test_loss_and_gradients_equal_plain_cross_entropy(
    family: str, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    base, adapter = adapted(family, **HEADS[kind])
    loss = loss_sum(base, one_row(BATCH))
    loss.backward()
    found = gradients(adapter)
    wanted = plain_loss(base, BATCH)
    wanted.backward()
    assert distance(loss, wanted) < 1e-12
    assert not far_apart(found, gradients(adapter), 1e-12)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_models_own_logits_give_the_same(family: str, kind: str) -> None:
    base, adapter = adapted(family, **HEADS[kind])
    row = one_row(BATCH)
    loss, losses = loss_sum(base, row), token_losses(base, row)
    loss.backward()
    found = gradients(adapter)
    base.head = Head(direct=False)
    again = loss_sum(base, row)
    again.backward()
    assert distance(again, loss) < 1e-12
    assert distance(token_losses(base, row), losses) < 1e-12
    assert not far_apart(gradients(adapter), found, 1e-12)


def test_gradient_is_scaled_by_what_comes_after() -> None:
    base, adapter = adapted("llama", modules_to_save=("lm_head",))
    row = one_row(BATCH)
    loss_sum(base, row).backward()
    once = gradients(adapter)
    (loss_sum(base, row) * 3).backward()
    assert not far_apart(gradients(adapter), {key: g * 3 for key, g in once.items()}, 1e-6)  # RMSNorm casts to float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_summed_in_float32(dtype: torch.dtype) -> None:
    base, _adapter = adapted("llama", dtype)
    row = one_row(BATCH)
    assert loss_sum(base, row).dtype == torch.float32
    losses = token_losses(base, row)
    assert losses.dtype == torch.float32
    one_rounding = 1e-5 if dtype == torch.float32 else 2**-9
    assert float(losses @ row.weight_N.float()) == pytest.approx(float(loss_sum(base, row)), rel=one_rounding)


def counting(rows: list[int], right: Any) -> Any:
    def counted(logits: torch.Tensor, *args: Any, **more: Any) -> Any:
        if logits.dim() == 2:  # and not attention's
            rows.append(len(logits))
        return right(logits, *args, **more)

    return counted


@pytest.mark.parametrize("fast", [frozenset({"head"}), frozenset()], ids=["by hand", "plain"])
def test_only_logits_of_a_chunk_are_there_at_once(fast: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)
    monkeypatch.setattr(head, "FROZEN_CHUNK", 4)
    base, _adapter = adapted("llama")
    base.fast_parts = fast
    rows: list[int] = []
    for module, name in ((torch, "softmax"), (torch.nn.functional, "cross_entropy")):
        monkeypatch.setattr(module, name, counting(rows, getattr(module, name)))
    loss_sum(base, one_row([example(10, 1, learned=1), example(9, 2, learned=1)]))
    assert sum(rows) == 19
    assert max(rows) == 4


def test_loss_needs_no_adapter() -> None:
    base = tiny_base("llama")
    row = one_row(BATCH, adapter=None)
    loss = token_losses(base, row)
    inject(base.model, LoraConfig(), base.router)
    assert torch.equal(token_losses(base, row), loss)


def test_every_family_with_a_scale_or_cap_is_here() -> None:
    keys = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    assert {f for f, c in CONFIGS.items() if any(k in c for k in keys)} == {"gemma2", "granite", "cohere"}
