"""What transformers leaves out of a GGUF file is read, and unknown scaling of positions is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorasmith.errors import ModelError
from lorasmith.loading.gguf_settings import FACTORS, LLAMA3, left_out, stretching

SCALED = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, **LLAMA3}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


def file(path: Path, architecture: str = "llama", factors: Any = None, **keys: Any) -> Path:
    """A GGUF file of keys, with the factors of Llama 3."""
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key.replace('__', '.')}", value)  # type: ignore[operator]
    writer.add_tensor(FACTORS if factors is not None else "output.weight", np.array(factors or [0.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**options: Any) -> Any:
    return AutoConfig.for_model("llama", **SIZES, **({"rope_parameters": SCALED | options} if options else {}))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_wavelengths_are_stretched_as_transformers_does(factor):
    scaling = SCALED | {"factor": factor}
    config = llama(factor=factor)
    own, _scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factors = stretching(config, scaling)
    assert torch.allclose(plain / factors, own.double(), rtol=1e-6)
    assert factors.min() == 1.0
    assert factors.max() == factor


def test_the_factors_of_llama_3_are_recognized(tmp_path):
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = stretching(config, SCALED).tolist()
    assert left_out(file(tmp_path / "a.gguf", factors=factors), config)["rope_parameters"] == SCALED
    with pytest.raises(ModelError, match=r"scaled in a way \(rope_freqs\.weight\) that is not read"):
        left_out(file(tmp_path / "b.gguf", factors=[f * 1.01 for f in factors]), config)


def test_linear_scaling_is_read_also_of_gemma_3(tmp_path):
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    found = left_out(file(tmp_path / "llama.gguf", **linear), llama())
    assert found == {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}
    gemma = AutoConfig.for_model("gemma3_text")
    rope = left_out(file(tmp_path / "gemma.gguf", "gemma3", **linear), gemma)["rope_parameters"]
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize("keys", [{}, {"rope__scaling__type": "none"}, {"rope__scaling__factor": 1.0}])
def test_without_scaling_there_is_nothing_to_say(tmp_path, keys):
    assert left_out(file(tmp_path / "a.gguf", **keys), llama()) == {}


def test_other_scaling_is_refused(tmp_path):
    other = {"rope__scaling__yarn_beta_fast": 16.0}, {"rope__scaling__attn_factor": 0.5}, {"rope__scaling__factor": 0.0}
    for number, keys in enumerate(other):
        path = file(tmp_path / f"{number}.gguf", **{"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0} | keys)
        with pytest.raises(
            ModelError, match=r"gguf: its rotary positions are scaled in a way \(yarn\) that is not read"
        ):
            left_out(path, llama())
    assert left_out(file(tmp_path / "b.gguf", "gpt-oss", rope__scaling__type="yarn"), llama()) == {}


def test_yarn_is_read(tmp_path):
    keys = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    wanted = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    found = left_out(file(tmp_path / "a.gguf", rope__scaling__original_context_length=512, **keys), llama())
    assert found == {"rope_parameters": wanted | {"original_max_position_embeddings": 512}}
    found = left_out(file(tmp_path / "b.gguf", **keys), llama())
    assert found == {"rope_parameters": wanted | {"original_max_position_embeddings": llama().max_position_embeddings}}


def test_sizes_that_transformers_leaves_out(tmp_path):
    sizes = {"attention__key_length": 24}
    assert left_out(file(tmp_path / "a.gguf", "qwen3", **sizes), llama()) == {"head_dim": 24}
    assert left_out(file(tmp_path / "b.gguf", "qwen3"), llama()) == {}
    gemma = AutoConfig.for_model("gemma3_text", num_hidden_layers=62, hidden_size=5376, num_attention_heads=32)
    found = left_out(file(tmp_path / "c.gguf", "gemma3", attention__key_length=128), gemma)
    assert found == {"query_pre_attn_scalar": 168}
