"""A tiny config for every causal family of transformers: its own defaults, with every size replaced by a small one."""

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.model_folders import ENDS

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
POSITIONS = 128
# sizes by the names that configs give them
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim_model_base"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "word_embed_proj_dim", "lru_width", "input_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "dff", "dim_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "output_embedding_size"), 48),
    **dict.fromkeys(("feed_forward_size", "dense_intermediate_size", "attention_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_value_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "dim_head", "d_head", "attention_head_size"), 8),
    **dict.fromkeys(("index_head_dim", "kv_channels", "rotary_dim", "linear_head_dim", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_head_dim", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "adapter_rank", "laurel_rank", "hc_lowrank", "d_rel"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "router_hidden_size", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "context_length", "model_max_length"), POSITIONS),
    "original_max_position_embeddings": POSITIONS,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), ENDS["vocab_size"]),
    "first_k_dense_replace": 1, "index_topk": 8, "index_n_heads": 8, "mamba_n_heads": 8, "mamba_expand": 2,
    "block_size": 8, "num_dense_layers": 1, "image_size": 16, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
# what a family needs besides
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "num_hidden_layers": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": ["local"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "local_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 9,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_hidden_layers": 2,
        "layers_block_type": ["mamba", "hybrid"],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "hybrid_layer_ids": [1],
    },
    "zaya": {"num_experts_per_tok": 1},
}
SPECIAL["qwen4_exp"] = {"text_config": SPECIAL["qwen4_exp_text"]}
ENDS_OF = {key: value for key, value in ENDS.items() if key != "vocab_size"}


def tiny_config(family: str) -> PretrainedConfig:
    """The config of a model of this family with about two layers, and one of each kind of layer that it has."""
    default = AutoConfig.for_model(family, **SPECIAL.get(family, {}).get("first", {}))
    special = {key: value for key, value in SPECIAL.get(family, {}).items() if key != "first"}
    return AutoConfig.for_model(family, **merged(_small(default), special))


def _small(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments that make a small config of the kind of `config`."""
    given: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            given[key] = _small(value)
        elif key in ENDS_OF:
            given[key] = ENDS_OF[key]
        elif (
            key in SMALL and isinstance(value, int | None) and not isinstance(value, bool) and (value or "head" in key)
        ):
            given[key] = SMALL[key]
    for key in config.attribute_map.values():  # both names would be given
        for alias, own in config.attribute_map.items():
            if own == key and key in given:
                given.pop(alias, None)
    if "kv_lora_rank" in given:  # each head has its own keys, made from the compressed ones
        given["num_key_value_heads"] = given["num_attention_heads"]
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        given["is_decoder"] = True
    given |= dict(_kinds_of_layers(config))
    return given


def _kinds_of_layers(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """One layer of each kind, instead of a list with dozens."""
    lists = {key: vars(config).get(key) for key in ("layer_types", "mlp_layer_types", "layers_block_type")}
    lists = {key: list(value) for key, value in lists.items() if isinstance(value, list | tuple) and value}
    if not lists:
        return
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True))) if len({*map(len, lists.values())}) == 1 else []
    if not kinds:
        return
    kinds = kinds if len(kinds) > 1 else kinds * 2
    yield "num_hidden_layers", len(kinds)
    for key, column in zip(lists, zip(*kinds, strict=True), strict=True):
        yield key, list(column)


def merged(small: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """`small` with what `special` says, in nested configs too."""
    both = {key: merged(small[key], value) for key, value in special.items()
            if isinstance(value, dict) and isinstance(small.get(key), dict)}  # fmt: skip
    return small | special | both
