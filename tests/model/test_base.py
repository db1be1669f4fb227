"""What a base says of its model: the decoder without head, the context length."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config

from lorasmith.model.base import positions_of
from lorasmith.model.probe import native_attention
from tests.support.families import CONFIGS, tiny_base


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=32), 32),
        (PretrainedConfig(), None),
        (PretrainedConfig(seq_length=1), None),
        (PretrainedConfig(seq_length="2048"), None),
        (Gemma3Config(text_config={"max_position_embeddings": 48}), 48),
    ],
)
def test_the_context_length_is_read_from_the_config(config: PretrainedConfig, positions: int | None) -> None:
    assert positions_of(config) == positions


@pytest.mark.parametrize("family", CONFIGS)
def test_the_decoder_gives_the_hidden_states_that_the_head_takes(family: str) -> None:
    base, taken = tiny_base(family), []
    base.output_embedding.register_forward_pre_hook(lambda _module, inputs: taken.append(inputs[0]))
    ids = torch.tensor([[3, 4, 5]])
    with native_attention(base):
        states = base.decoder(input_ids=ids).last_hidden_state
        base.model(input_ids=ids)
    torch.testing.assert_close(states, taken[0])


@pytest.mark.parametrize("named", ["itself", "its head"])
def test_a_model_that_names_another_part_its_decoder(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 4 and ModernBERT do."""
    base: Any = tiny_base("llama")
    other = base.model if named == "itself" else base.output_embedding
    monkeypatch.setattr(base.model, "get_decoder", lambda: other)
    assert base.decoder is base.model.model


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", torch.bfloat16, True), ("cpu", torch.float32, False), ("cuda", torch.bfloat16, False)],
)
def test_only_bfloat16_on_a_cpu_compiles_shapes(device: str, dtype: torch.dtype, expected: bool) -> None:
    base: Any = tiny_base("llama")
    base.device, base.dtype = SimpleNamespace(type=device), dtype
    assert base.compiles_shapes == expected
