"""What is saved of an adapter, and taken from what was saved."""

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.lora.inject import inject
from lorasmith.lora.saved_values import has_moved, restore_values, saved_values
from tests.support.families import logits_of, stir, tiny_base

CASES = [
    {},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "mica", "modules_to_save": ("lm_head",)},
    {"target_modules": ("embed_tokens", "q_proj"), "bias": "all"},
]


@pytest.mark.parametrize("options", CASES)
def test_an_adapter_without_values_gets_those_that_were_saved(options: dict) -> None:
    base, again = tiny_base("llama"), tiny_base("llama")
    adapter = inject(base.model, LoraConfig(r=4, **options), base.router)
    stir(adapter)
    tensors = saved_values(adapter, base.model)
    other = inject(again.model, LoraConfig(r=4, **options), again.router, start=False)
    restore_values(other, again.model, tensors)
    assert torch.equal(logits_of(again), logits_of(base))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in saved_values(other, again.model).items())


def test_a_layer_that_is_not_among_them_gets_zeros() -> None:
    base = tiny_base("llama")
    adapter = inject(base.model, LoraConfig(init_lora_weights="olora"), base.router)
    stir(adapter)
    tensors = {key: p for key, p in saved_values(adapter, base.model).items() if "layers.1" not in key}
    again = tiny_base("llama")
    other = inject(again.model, LoraConfig(init_lora_weights="olora"), again.router, start=False)
    restore_values(other, again.model, tensors)
    for key, p in other.parameters.items():
        assert bool(p.any()) == ("layers.0" in key)
    assert logits_of(again).isfinite().all()


@pytest.mark.parametrize("options", CASES)
def test_a_new_adapter_has_not_moved_unless_it_trains_a_whole_module(options: dict) -> None:
    base = tiny_base("llama")
    adapter = inject(base.model, LoraConfig(r=4, **options), base.router)
    assert has_moved(adapter, base.model) == ("modules_to_save" in options)
    stir(adapter)
    assert has_moved(adapter, base.model)
