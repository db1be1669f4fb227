"""The rank and scaling of modules and experts, and ranks that are too large."""

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.inject import inject
from lorasmith.lora.ranks import rank_and_alpha
from tests.support.experts import moe_base


def test_rank_and_alpha_of_a_module() -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, rank_pattern={"q_proj": 2, r"layers\.1\..*": 3}, alpha_pattern={"^model.*v_proj": 5}
    )
    assert rank_and_alpha(config, "model.layers.0.self_attn.q_proj") == (2, 16)
    assert rank_and_alpha(config, "model.layers.1.self_attn.q_proj") == (2, 16), "the first that matches"
    assert rank_and_alpha(config, "model.layers.1.self_attn.v_proj") == (3, 5)
    assert rank_and_alpha(config, "model.layers.0.self_attn.xq_proj") == (8, 16)
    assert rank_and_alpha(config, "model.layers.0.self_attn.q_proj_norm") == (8, 16)


def test_the_rank_of_experts_is_divided_by_how_many_compute_a_token() -> None:
    base = moe_base("mixtral")
    adapter = inject(base.model, LoraConfig(r=8), base.router)
    assert {p.shape[0] // 4 for key, p in adapter.parameters.items() if "experts" in key and "lora_A" in key} == {4}
    own = inject(base.model, LoraConfig(r=8, rank_pattern={"experts.down_proj": 3}), base.router, "own")
    ranks = {
        key.split("experts.")[1]: p.shape[0] // 4
        for key, p in own.parameters.items()
        if "experts" in key and "_A" in key
    }
    assert ranks == {"base_layer.lora_A.weight": 4, "lora_A.weight": 3}
    least = inject(base.model, LoraConfig(r=1), base.router, "least")
    assert {p.shape[0] // 4 for key, p in least.parameters.items() if "experts" in key and "_A" in key} == {1}
    with pytest.raises(ConfigError, match=r"would have rank 40, but the layers of this model can have at most 32"):
        inject(base.model, LoraConfig(r=8, rank_pattern={"experts.down_proj": 40}), base.router, "large")
