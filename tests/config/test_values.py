"""Every option of every part takes its own kind within its bounds; whatever else is a sentence that names the key."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from lorasmith.cli.flags import FLAG_SECTIONS, default_text, kinds_of
from lorasmith.config.toml import load_config
from lorasmith.config.training import MAX_STEPS
from lorasmith.config.values import SHOWN, CommandLineText, check
from lorasmith.errors import ConfigError

HUGE = (1e300, -1e300, math.inf, -math.inf, math.nan, 10**12, -(10**12), 10**400, 10**5000, -1)


def options() -> Iterator[tuple[str, type[BaseModel], str, Any]]:
    for section, model in FLAG_SECTIONS.items():
        for key, field in model.model_fields.items():
            yield section, model, key, kinds_of(field.annotation)


def refusal(section: str, model: type[BaseModel], key: str, value: Any) -> str:
    """What is said of a value; "" where it is taken."""
    try:
        check(model, {key: value}, section)
    except ConfigError as error:
        return str(error)
    return ""


def test_no_option_takes_a_value_of_another_kind():
    for section, model, key, kinds in options():
        wrong: list[Any] = [] if bool in kinds or key == "init_lora_weights" else [True, False]  # as in PEFT
        wrong += [] if str in kinds or key in ("eval_every", "save_every", "learning_rate", "dtype") else ["1"]
        wrong += [] if float in kinds else [8.0]
        wrong += [[True], [1.5], ["1"], {"a": True}] if kinds in ([int], [float], [bool]) else []
        for value in wrong:
            assert refusal(section, model, key, value).startswith(f"{section}.{key}: "), (key, value)


def test_an_item_of_a_list_or_pair_is_of_its_kind_too():
    for key, value in (("layers_to_transform", [True]), ("layers_to_transform", [1.0]), ("layers_to_transform", ["1"]),
                       ("rank_pattern", {"q": "4"}), ("rank_pattern", {"q": 4.0}), ("alpha_pattern", {"q": True}),
                       ("target_modules", [1]), ("modules_to_save", [True])):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^lora\.{key}: .* must be "):
            load_config(None, {"lora": {key: value}})


def test_no_number_is_taken_that_nothing_can_hold():
    for section, model, key, kinds in options():
        if not {int, float} & set(kinds):
            continue
        for value in HUGE:
            text = refusal(section, model, key, value)
            assert len(text) < 200
            if not text and section != "sampling" and key != "held_out":  # the engine clamps; prepare.py looks at these
                assert abs(value) <= 1e30, (key, value)
                assert float in kinds or value <= 1_000_000_000, (key, value)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 10**400])
def test_patterns_have_the_bounds_of_what_they_replace(pattern, value):
    with pytest.raises(ConfigError, match=r"^lora[.:]"):
        load_config(None, {"lora": {pattern: {"q": value}}})


def test_a_word_of_the_command_line_is_text_that_may_be_a_number():
    assert (
        load_config(
            None, {"lora": {"r": CommandLineText("4")}, "training": {"epochs": CommandLineText("1e1")}}
        ).training.epochs
        == 10
    )
    wrong = r"^training\.max_steps: invalid value '1000000000000': must be at most 999999$"
    with pytest.raises(ConfigError, match=wrong):
        load_config(None, {"training": {"max_steps": CommandLineText("1000000000000")}})
    with pytest.raises(ConfigError, match=r"^lora\.r: invalid value '99+\.\.\.: must be "):
        load_config(None, {"lora": {"r": CommandLineText("9" * 5000)}})


def test_defaults_are_within_their_bounds_and_a_long_value_is_cut():
    for section, model, key, _kinds in options():
        field = model.model_fields[key]
        assert refusal(section, model, key, field.default) == "", default_text(field.default)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"training": {"schedule": "x" * 5000}})
    assert len(str(caught.value)) < SHOWN + 100
    assert load_config(None, {"training": {"max_steps": MAX_STEPS}}).training.max_steps == MAX_STEPS
