"""Ranks that layers can have. Those of starts that are computed from the weights: test_start_values.py."""

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.lora import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.lora.ranks import features, rank_and_alpha, refuse_ranks

LAYERS = {"q": nn.Linear(8, 6), "k": nn.Linear(8, 2), "c": Conv1D(5, 7), "e": nn.Embedding(20, 3)}


def test_features_are_inputs_and_outputs() -> None:
    assert features(LAYERS["q"]) == (8, 6)
    assert features(LAYERS["c"]) == (7, 5)


def test_a_rank_above_that_of_every_layer_is_refused() -> None:
    refuse_ranks(LAYERS, LoraConfig(r=6))
    with pytest.raises(ConfigError, match=r"lora\.r: q would have rank 7, but .* at most 6"):
        refuse_ranks(LAYERS, LoraConfig(r=1, rank_pattern={"q": 7}))
    with pytest.raises(ConfigError, match="at most 3"):
        refuse_ranks({"e": LAYERS["e"]}, LoraConfig(r=4))


def test_a_start_from_the_weights_needs_the_rank_in_every_layer() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_ranks(LAYERS, LoraConfig(r=3, init_lora_weights="mica"))
    assert len(caught.value.problems) == 1
    assert "the weight of k has only 2 singular values, so its rank cannot be 3" in str(caught.value)
    refuse_ranks(LAYERS, LoraConfig(r=3, init_lora_weights="mica", rank_pattern={"k": 2}))


def test_orthogonal_matrices_need_an_even_rank() -> None:
    with pytest.raises(ConfigError, match=r"needs an even rank, but r is 3\. Use 4"):
        refuse_ranks(LAYERS, LoraConfig(r=2, init_lora_weights="orthogonal", rank_pattern={"q": 3}))


def test_patterns_give_a_module_its_own_rank_and_alpha() -> None:
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"k": 2}, alpha_pattern={"q": 3})
    assert rank_and_alpha(config, "layers.0.k") == (2, 8)
    assert rank_and_alpha(config, "layers.0.q") == (4, 3)
