"""The rank and scaling of modules and experts, and ranks that are too large.

Those of starts that are computed from the weights: test_start_values.py.
"""

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.inject import inject
from lorasmith.lora.ranks import features, rank_and_alpha, refuse_ranks
from lorasmith.lora.target import Targets
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


LAYERS = {"q": nn.Linear(8, 6), "k": nn.Linear(8, 2), "c": Conv1D(5, 7), "e": nn.Embedding(20, 3)}


def refuse(layers: dict[str, nn.Module], config: LoraConfig) -> None:
    refuse_ranks(layers, {}, config, Targets())


def test_features_are_inputs_and_outputs() -> None:
    assert features(LAYERS["q"]) == (8, 6)
    assert features(LAYERS["c"]) == (7, 5)


def test_a_rank_above_that_of_every_layer_is_refused() -> None:
    refuse(LAYERS, LoraConfig(r=6))
    with pytest.raises(ConfigError, match=r"lora\.r: q would have rank 7, but .* at most 6"):
        refuse(LAYERS, LoraConfig(r=1, rank_pattern={"q": 7}))
    with pytest.raises(ConfigError, match="at most 3"):
        refuse({"e": LAYERS["e"]}, LoraConfig(r=4))


def test_a_start_from_the_weights_needs_the_rank_in_every_layer() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse(LAYERS, LoraConfig(r=3, init_lora_weights="mica"))
    assert len(caught.value.problems) == 1
    assert "the weight of k has only 2 singular values, so its rank cannot be 3" in str(caught.value)
    refuse(LAYERS, LoraConfig(r=3, init_lora_weights="mica", rank_pattern={"k": 2}))


def test_orthogonal_matrices_need_an_even_rank() -> None:
    with pytest.raises(ConfigError, match=r"needs an even rank, but r is 3\. Use 4"):
        refuse(LAYERS, LoraConfig(r=2, init_lora_weights="orthogonal", rank_pattern={"q": 3}))
