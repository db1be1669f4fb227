"""Families that other tests do not cover: each loads and learns, or is refused with the reason."""

from typing import Any

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError, ModelError
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.model.attention import IMPLEMENTATION
from lorasmith.model.base import Base
from lorasmith.model.probe import native_attention
from lorasmith.model.target_check import check_targets
from lorasmith.model.verify import enable_fast_parts, trial_loss
from lorasmith.report import Report

IDS = [5, 17, 60, 3, 8, 44, 92, 31, 9, 9, 12, 71, 4, 20, 6, 50]


def adapt(base: Base, **options: Any) -> None:
    base.adapters["a"] = inject(base.model, LoraConfig(r=2, **options), base.router, "a")
    check_targets(base, "a", IDS, Report())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["ctrl", "llama4_text", "modernbert-decoder", "mamba2", "rembert", "phimoe"])
def test_all_linear_learns(family: str, dtype: str, load: Any) -> None:
    base = load(family, dtype)
    adapt(base)
    enable_fast_parts(base, "a", IDS)
    loss, _tokens = trial_loss(base, "a", IDS)
    loss.backward()
    grads = [p.grad for key, p in base.adapters["a"].parameters.items() if ".lora_B." in key and "experts" not in key]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_router_that_returns_a_tuple_is_no_target(load: Any) -> None:
    base = load("phimoe")
    adapt(base)
    router = base.model.get_submodule("model.layers.0.mlp.router")
    assert isinstance(router, torch.nn.Linear)
    assert not isinstance(router, LoRALayer)
    with pytest.raises(ConfigError, match=r"'router' matches model\.layers\.0\.mlp\.router, a \w+Router"):
        inject(base.model, LoraConfig(target_modules="router"), base.router, "b")


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "BertLMHeadModel"), ("prophetnet", "ProphetNetForCausalLM")]
)  # the one sees later tokens; in the other, logits depend on their number
def test_a_model_that_is_not_causal_is_refused(family: str, kind: str, load: Any) -> None:
    with pytest.raises(ModelError, match=rf"{kind} is not a causal language model: .* depends on the tokens after it"):
        load(family)


def test_the_attention_of_the_text_part_is_given_back(load: Any) -> None:
    base = load("got_ocr2")
    assert base.layout == "packed"
    with native_attention(base):
        assert base.decoder.config._attn_implementation != IMPLEMENTATION
        assert base.model(input_ids=torch.tensor([IDS])).logits.isfinite().all()
    assert base.decoder.config._attn_implementation == IMPLEMENTATION


def test_a_model_that_cannot_read_a_short_text_is_refused(load: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load("reformer")
    text = str(caught.value)
    assert "ReformerModelWithLMHead cannot be used as a language model of plain text" in text
    assert "axial_pos_shape" in text
