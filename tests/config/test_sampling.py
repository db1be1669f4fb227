"""Options of generation: bounds, defaults, and which of them the command line and the API share."""

import pytest

from lorasmith.config.sampling import Sampling, SamplingConfig, SamplingFlags
from lorasmith.config.values import check
from lorasmith.errors import ConfigError


def test_the_default_is_greedy_without_penalties():
    assert SamplingConfig().temperature == 0
    assert not SamplingConfig().penalizes
    assert SamplingConfig().logprobs is None


@pytest.mark.parametrize(
    ("option", "value"), [("repetition_penalty", 1.1), ("presence_penalty", -0.5), ("frequency_penalty", 0.5)]
)
def test_each_penalty_penalizes(option, value):
    assert SamplingConfig(**{option: value}).penalizes


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.01),
        ("frequency_penalty", -2.01),
        ("max_new_tokens", 0),
        ("seed", 2**32),
        ("logprobs", 21),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("stop", [1]),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=rf"^sampling\.{option}: invalid value "):
        check(SamplingConfig, {option: value}, "sampling")


def test_an_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"^sampling\.temprature: unknown key\. Did you mean 'temperature'\?$"):
        check(SamplingConfig, {"temprature": 1.0}, "sampling")


def test_what_all_share_is_offered_everywhere():
    shared, flags, config = (model.model_fields.keys() for model in (Sampling, SamplingFlags, SamplingConfig))
    assert shared < flags < config
    assert config - flags == {"logprobs", "logit_bias"}
