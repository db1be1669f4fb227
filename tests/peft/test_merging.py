"""Merging and unmerging, beside PEFT's."""

from typing import Any

import pytest
import torch

import lorasmith.peft as ours
from tests.support.peft_pair import base, compare, ids, logits, same, state, stirred, two


def weights(model: Any) -> dict[str, torch.Tensor]:
    plain = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    return {name: p.detach().clone() for name, p in plain.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merge_adapter_and_unmerge_adapter() -> None:
    def program(library: Any) -> list[Any]:
        model = two(library)
        before, plain = logits(model), weights(model)
        model.merge_adapter()
        found = [state(model), weights(model)]
        model.merge_adapter()  # already merged
        found.append(state(model))
        model.merge_adapter(adapter_names=["second"], safe_merge=True)
        found.append(state(model))
        model.unmerge_adapter()
        found += [state(model), weights(model)]
        if library is ours:
            assert all(torch.equal(weights(model)[name], w) for name, w in plain.items())  # PEFT's only nearly
            assert torch.equal(logits(model), before)
        model.merge_adapter()
        model.set_adapter("second")  # unmerges
        found.append(state(model))
        model.merge_adapter()
        with model.disable_adapter():  # as well
            found.append(logits(model))
        found.append(state(model))
        return found

    found = same(program)
    compare(found[0]["logits"], found[4]["logits"], 1e-5)
    assert found[0]["status"]["merged_adapters"] == ["first"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"safe_merge": True},
        {"adapter_names": ["second"]},
        {"adapter_names": ["first", "second"]},
        {"progressbar": True},
    ],
    ids=str,
)
def test_merge_and_unload(given: dict[str, Any]) -> None:
    def program(library: Any) -> list[Any]:
        model = two(library)
        merged = model.merge_and_unload(**given)
        assert not any("lora" in name for name, _m in merged.named_modules())
        return [type(merged), logits(merged), weights(merged)]

    same(program)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merging_in_other_dtypes_is_close_to_the_sum_in_float64(dtype: torch.dtype) -> None:
    model = stirred(ours.get_peft_model(base(dtype=dtype), ours.LoraConfig(target_modules="all-linear"))).eval()
    truth = stirred(ours.get_peft_model(base(dtype=torch.float64), ours.LoraConfig(target_modules="all-linear"))).eval()
    for layer, exact in zip(
        *([m for m in one.modules() if hasattr(m, "updates")] for one in (model, truth)), strict=True
    ):
        for p, wide in zip(layer.updates["default"].matrices, exact.updates["default"].matrices, strict=True):
            wide.data.copy_(p.data)
        exact.base_layer.weight.data.copy_(layer.base_layer.weight.data)
    merged, wanted = weights(model.merge_and_unload()), weights(truth.merge_and_unload())
    for name, w in merged.items():
        assert torch.equal(w, wanted[name].to(dtype)), name  # rounded once


def test_broken_adapters_are_not_merged_safely() -> None:
    model = two(ours)
    plain = weights(model)
    next(m for m in model.modules() if hasattr(m, "updates")).updates["first"].matrices[0].data[0, 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter first seems to be broken"):
            merge(safe_merge=True)
        assert all(torch.equal(weights(model)[name], w) for name, w in plain.items())
    with pytest.raises(TypeError, match="should be a list"):
        model.merge_adapter(adapter_names="first")
    with pytest.raises(ValueError, match="third not found"):
        model.merge_adapter(adapter_names=["third"])


def test_a_merged_adapter_is_not_deleted() -> None:
    model = two(ours)
    model.merge_adapter()
    with pytest.raises(ValueError, match="first is merged"):
        model.base_model.delete_adapter("first")


def test_generate_is_the_same_before_and_after() -> None:
    model = two(ours)
    given = {"input_ids": ids(), "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    before = model.generate(**given)
    assert torch.equal(model.merge_and_unload().generate(**given), before)
    assert not torch.equal(base().generate(**given), before)
