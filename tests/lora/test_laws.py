"""Laws 1 to 3 of LoRA on every main family, against the untouched model."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import inject
from lorasmith.lora.merge import merged_weights
from lorasmith.model.forward import hidden
from lorasmith.model.head import loss_sum
from tests.support.families import (
    MAIN,
    adapted,
    distance,
    embedding,
    examples,
    logits_of,
    one_linear,
    one_row,
    tiny,
    tiny_base,
)

KINDS = ("linear", "embedding", "whole", "biases", "biases of targets", "rslora")


def options(kind: str, family: str) -> dict[str, Any]:
    return {
        "linear": {},
        "embedding": {"target_modules": (embedding(family), one_linear(family))},
        "whole": {"modules_to_save": (embedding(family), "lm_head")},
        "biases": {"bias": "all"},
        "biases of targets": {"bias": "lora_only", "target_modules": one_linear(family)},
        "rslora": {"use_rslora": True, "rank_pattern": {one_linear(family): 6}, "alpha_pattern": {".*": 3.0}},
    }[kind]


def digests(model: nn.Module, frozen_only: bool = False) -> dict[str, str]:
    """A hash of every parameter and buffer, to the last bit."""
    tensors = dict(model.named_buffers())
    tensors |= {name: p for name, p in model.named_parameters() if not (frozen_only and p.requires_grad)}
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


# --- law 1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MAIN)
def test_fresh_adapter_leaves_every_bit_of_the_logits(family: str, kind: str) -> None:
    base, row = tiny_base(family), one_row(examples())
    logits, states = logits_of(base), hidden(base, row)
    inject(base.model, LoraConfig(**options(kind, family)), base.router)
    assert torch.equal(logits_of(base), logits)
    assert torch.equal(hidden(base, row), states)


@pytest.mark.parametrize("family", MAIN)
def test_fresh_adapter_leaves_every_bit_with_dropout_in_eval_and_in_bfloat16(family: str) -> None:
    base = tiny_base(family, torch.bfloat16)
    base.model.eval()
    before = logits_of(base)
    config = LoraConfig(lora_dropout=0.5, modules_to_save=("lm_head",), init_lora_weights="gaussian")
    inject(base.model, config, base.router)
    assert torch.equal(logits_of(base), before)


# --- law 2 ------------------------------------------------------------------------------------------------------------


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """New parameters under these names; one end of a tied pair is untied by that."""
    for name, W in weights.items():
        path, _dot, leaf = name.rpartition(".")
        assert getattr(model.get_submodule(path), leaf).shape == W.shape
        setattr(model.get_submodule(path), leaf, nn.Parameter(W))
    return model


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MAIN)
def test_merged_equals_unmerged_and_merging_is_pure(family: str, kind: str) -> None:
    base, adapter = adapted(family, **options(kind, family))
    ours, before = logits_of(base), digests(base.model)
    merged = merged_weights(base.model, adapter)
    assert digests(base.model) == before
    assert torch.equal(logits_of(base), ours)
    plain = tiny(family)
    assert distance(logits_of(plain), ours) > 0.01, "the adapter changes too little for this test to mean anything"
    assert distance(logits_of(with_weights(plain, merged)), ours) < 1e-12  # float64: sums in another order


# --- law 3 ------------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The shapes of all results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("mm", "linear", "matmul", "einsum", "conv")) and isinstance(out, Tensor):
            self.shapes.append(tuple(out.shape))
        return out


def weight_gradients_formed(base: Any, row: Any, frozen: list[Tensor]) -> list[tuple[int, ...]]:
    """Products of a forward and backward whose result has the shape of a frozen matrix or its transpose."""
    shapes = {tuple(p.shape) for p in frozen} | {tuple(p.shape)[::-1] for p in frozen}
    sizes = {n for shape in shapes for n in shape}
    assert not sizes & {row.tokens, len(row.at_N)}, "a row of states would look like a weight"
    with Products() as products:
        loss_sum(base, row).backward()
    assert len(products.shapes) > 20
    return [shape for shape in products.shapes if shape in shapes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MAIN)
def test_training_step_changes_no_frozen_tensor_and_forms_no_gradient_for_one(family: str, kind: str) -> None:
    base, adapter = adapted(family, **options(kind, family))
    base.model.train()
    mine = {id(p) for p in adapter.parameters.values()}
    frozen = [p for p in base.model.parameters() if id(p) not in mine]
    before, own = digests(base.model, frozen_only=True), [p.detach().clone() for p in adapter.parameters.values()]
    optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=0.1)
    copies = {p.shape for p in adapter.parameters.values()}
    row = one_row(examples())
    assert not weight_gradients_formed(base, row, [p for p in frozen if p.dim() == 2 and p.shape not in copies])
    assert all(p.grad is None for p in frozen)
    optimizer.step()
    assert digests(base.model, frozen_only=True) == before
    moved = [not torch.equal(p, old) for p, old in zip(adapter.parameters.values(), own, strict=True)]
    assert all(moved), "a parameter of the adapter got no gradient"


def test_a_weight_gradient_would_be_noticed() -> None:
    base, _adapter = adapted("llama")
    weight = base.model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight
    weight.requires_grad_(True)
    assert weight_gradients_formed(base, one_row(examples()), [weight]) == [(48, 32)]
