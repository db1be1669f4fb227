"""Families in GGUF: what cannot be exported is refused by name, and layouts are undone exactly."""

import pytest
import torch
from transformers import AutoConfig

from lorasmith.errors import ModelError
from lorasmith.export.gguf.families import FAMILIES, family_of, in_halves, interleaved, keys_of, names_of
from lorasmith.loading.gguf_settings import LLAMA3

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("bloom", {}, "Models of type bloom cannot be exported to GGUF yet; these can: gemma3_text, gpt2,"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=dynamic"),
        (
            "llama",
            {"rope_parameters": YARN_ROPE | {"beta_fast": 16.0}},
            r"beta_fast=16\.0 cannot .* only with beta_fast=32",
        ),
        ("qwen3", {"rope_parameters": YARN_ROPE | {"attention_factor": 1.0}}, r"attention_factor=1\.0 cannot"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": PLAIN}},
            "rope_type=yarn",
        ),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "rope_type=llama3"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("gemma3_text", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 1]}, r"no_rope_layers=\[1, 1, 1, 1\]"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(family, options, words):
    with pytest.raises(ModelError, match=words):
        family_of(AutoConfig.for_model(family, **options))


def test_a_weight_without_a_name_is_refused():
    name_of = names_of(AutoConfig.for_model("llama"))
    assert name_of("model.layers.1.self_attn.q_proj.weight") == "blk.1.attn_q.weight"
    with pytest.raises(ModelError, match=r"model\.other\.weight: GGUF has no name for this weight"):
        name_of("model.other.weight")


def test_interleaving_moves_the_pairs_of_the_rotation_together():
    config = AutoConfig.for_model("llama", num_attention_heads=2, num_key_value_heads=1)
    rows = torch.arange(8)[:, None] * torch.ones(1, 3)
    mixed = interleaved("blk.0.attn_q.weight", rows, config)
    assert mixed[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # two heads of four: rows 0 and 2 are one pair
    assert torch.equal(in_halves("blk.0.attn_q.weight", mixed, config), rows)
    assert interleaved("blk.0.attn_v.weight", rows, config) is rows


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_change_is_undone(family):
    config = AutoConfig.for_model(family)
    own = FAMILIES[family]
    for name, shape in (("blk.0.attn_q.weight", (64, 32)), ("blk.0.attn_norm.weight", (32,))):
        config.num_attention_heads = config.num_key_value_heads = 4
        tensor = torch.randn(shape, dtype=torch.float64)
        back = own.undo(name, own.change(name, tensor, config), config)
        assert torch.allclose(back, tensor, atol=1e-12)


def test_a_sliding_window_limits_the_context():
    config = AutoConfig.for_model("mistral", sliding_window=512, max_position_embeddings=4096)
    assert keys_of(config)["llama.context_length"] == 512


def test_the_largest_gemma_3_scales_its_attention_by_another_size():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=62, hidden_size=5376, num_attention_heads=32)
    config.query_pre_attn_scalar = 168
    assert family_of(config).architecture == "gemma3"
    config.query_pre_attn_scalar = config.head_dim
    with pytest.raises(ModelError, match="only with query_pre_attn_scalar=168"):
        family_of(config)
