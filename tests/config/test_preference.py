"""The options of training on preferences: their defaults by method, and what a method does not use."""

import pytest

from lorasmith.config.preference import METHODS, PreferenceConfig
from lorasmith.config.toml import load_config
from lorasmith.errors import ConfigError


def test_beta_depends_on_the_method():
    assert [PreferenceConfig().beta_of(method) for method in METHODS] == [0.1, 0.1, 0.1, 2.0]
    assert PreferenceConfig(beta=0.7).beta_of("simpo") == 0.7


@pytest.mark.parametrize(
    ("method", "options", "users"),
    [
        ("lora", {"beta": 0.2}, "dpo, orpo, kto, simpo"),
        ("dpo", {"gamma": 0.5}, "simpo"),
        ("orpo", {"label_smoothing": 0.1}, "dpo, simpo"),
        ("kto", {"rpo_alpha": 0.5}, "dpo, simpo"),
        ("simpo", {"desirable_weight": 0.5}, "kto"),
    ],
)
def test_an_option_that_the_method_does_not_use_is_refused(method, options, users):
    (key,) = options
    wanted = f"preference.{key}: used by {users} only, but training.method is '{method}'; remove it"
    with pytest.raises(ConfigError) as error:
        load_config(None, {"training": {"method": method}, "preference": options})
    assert str(error.value) == wanted
    assert load_config(None, {"training": {"method": users.split(", ")[0]}, "preference": options})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"learn": "all"}, r"data\.learn: training on preferences \(dpo\) learns whole answers"),
        ({"too_long": "split"}, r"data\.too_long: 'split' does not work for preferences \(dpo\)"),
        ({"too_long": "truncate-left"}, r"data\.too_long: 'truncate-left' does not work"),
    ],
)
def test_ways_to_learn_or_to_shorten_that_preferences_do_not_have_are_refused(data, text):
    with pytest.raises(ConfigError, match=text):
        load_config(None, {"training": {"method": "dpo"}, "data": data})
    assert load_config(None, {"data": data})
