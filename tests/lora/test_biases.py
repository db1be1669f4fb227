"""Trained biases of the base model."""

from typing import Any

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import AdapterError, ConfigError
from lorasmith.lora.inject import inject
from lorasmith.lora.layer import LoRALayer
from lorasmith.lora.router import Router
from tests.support.families import adapted, tiny


@pytest.mark.parametrize(("first", "second"), [("all", "none"), ("none", "lora_only")])
def test_biases_are_trained_by_one_adapter_alone(first: Any, second: Any) -> None:
    base, _first = adapted("gpt2", bias=first)
    with pytest.raises(AdapterError, match="changes the base model itself, so it cannot be shared"):
        inject(base.model, LoraConfig(bias=second), base.router, "second")


def test_a_bias_in_a_module_trained_whole_is_no_bias_of_the_base() -> None:
    base, _first = adapted("gpt2", modules_to_save=("ln_f",))
    inject(base.model, LoraConfig(modules_to_save=("ln_f",)), base.router, "second")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_in_half_precision_are_not_trained(bias: Any, dtype: torch.dtype) -> None:
    model = tiny("gpt2", dtype)
    text = (
        rf"^lora\.bias: '{bias}' trains .*, but this base model is in half precision, .*\. "
        r"Load it with --dtype float32\.$"
    )
    with pytest.raises(ConfigError, match=text):
        inject(model, LoraConfig(bias=bias), Router())
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    inject(tiny("gpt2", torch.float32), LoraConfig(bias=bias), Router())
