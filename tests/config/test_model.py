"""Options of the base model."""

import pytest
import torch

from lorasmith.config.model import ModelConfig
from lorasmith.config.values import check
from lorasmith.errors import ConfigError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_is_one_of_torch(dtype):
    assert isinstance(getattr(torch, ModelConfig(dtype=dtype).dtype), torch.dtype)


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "int8"), ("device", 0), ("trust_remote_code", 1), ("model", None)]
)
def test_another_value_is_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=rf"^model\.{option}: invalid value {value!r}: must be "):
        check(ModelConfig, {option: value}, "model")


def test_code_of_a_model_is_not_trusted_by_default():
    assert not ModelConfig().trust_remote_code
