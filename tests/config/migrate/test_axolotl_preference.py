"""Axolotl's preferences: methods, options of the losses, and the formats of the data."""

import pytest

from lorasmith.config.migrate.axolotl_preference import OPTIONS
from lorasmith.config.preference import PreferenceConfig
from lorasmith.errors import ConfigError
from tests.support.migrating import AXOLOTL, converted


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def text(kind: str, more: str) -> str:
    return AXOLOTL.replace("type: chat_template", f"type: {kind}") + more


@pytest.mark.parametrize(
    ("more", "method", "options"),
    [
        ("rl: dpo", "dpo", {"beta": 0.1}),
        ("rl: dpo\nrl_beta: 0.3\ndpo_label_smoothing: 0.1\nrpo_alpha: 0.5\ncpo_alpha: 2\nkto_desirable_weight: 3",
         "dpo",
         {"beta": 0.3, "label_smoothing": 0.1, "rpo_alpha": 0.5}),
        ("rl: dpo\ndpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1.0, 0.2]", "dpo",
         {"beta": 0.1, "rpo_alpha": 0.2}),
        ("rl: orpo\norpo_alpha: 0.2\nrl_beta: 0.3\ntrl:\n  beta: 0.4", "orpo", {"beta": 0.4}),
        ("rl: kto\nrl_beta: 0.2\nkto_desirable_weight: 0.2", "kto", {"beta": 0.2, "desirable_weight": 0.2}),
        ("rl: simpo\nsimpo_gamma: 0.7", "simpo", {"beta": 0.1, "gamma": 0.7, "rpo_alpha": 1}),  # TRL's defaults
        ("rl: simpo\nrl_beta: 2\ncpo_alpha: 0\nsimpo_gamma: 0.7", "simpo", {"beta": 2, "gamma": 0.7}),
    ],
)  # fmt: skip
def test_methods_and_options(tmp_path, more, method, options):
    kind = "llama3.intel" if method == "kto" else "chat_template.argilla_chat"
    config, done = converted(tmp_path, text(kind, more + "\nrl_adapter_ref_model: true\n"))
    assert (config.training.method, config.preference) == (method, PreferenceConfig(**options))
    assert not done.unmatched


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("rl: ipo", "rl: ipo: lorasmith does not have this loss"),
        ("rl: dpo\ndpo_loss_type: [hinge]", "dpo_loss_type: hinge: lorasmith does not have this loss"),
        ("rl: dpo\ndpo_use_weighting: true", "dpo_use_weighting: true: lorasmith does not have this loss"),
        ("rl: grpo", "rl: grpo: lorasmith trains on examples, or on preferences with DPO, ORPO, KTO or SimPO"),
    ],
)
def test_other_losses_are_refused(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        converted(tmp_path, AXOLOTL + more + "\n")


def test_all_weights_are_not_trained_on_preferences(tmp_path):
    with pytest.raises(ConfigError, match="rl: dpo: lorasmith trains an adapter on preferences, not all weights"):
        converted(tmp_path, text("chatml", "rl: dpo\n").replace("adapter: lora\n", ""))


@pytest.mark.parametrize(
    ("method", "kind", "template", "columns"),
    [
        ("dpo", "chatml.intel", "chatml", {"prompt": "question"}),
        ("dpo", "llama3.icr", "model", {"prompt": "input"}),
        ("orpo", "chat_template.argilla", "model", {}),
        ("dpo", "chat_template.default\n    field_messages: talk\n    field_rejected: bad", "model",
         {"conversations": "talk", "rejected": "bad"}),
        ("dpo", "chat_template\n    chat_template: chatml\n    field_chosen: good", "chatml", {"chosen": "good"}),
        ("kto", "chatml.argilla", "chatml", {"prompt": "instruction"}),
    ],
)  # fmt: skip
def test_formats_of_the_data(tmp_path, method, kind, template, columns):
    config, done = converted(tmp_path, text(kind, f"rl: {method}\n"))
    assert (config.data.template, config.data.map, config.data.too_long) == (template, columns, "drop")
    assert not done.unmatched


@pytest.mark.parametrize("kind", ["user_defined.default", "zephyr.nectar", "chatml.argilla_chat", "passthrough"])
def test_other_formats_are_refused(tmp_path, kind):
    with pytest.raises(ConfigError, match=f"{kind}: lorasmith does not know this prompt format"):
        converted(tmp_path, text(kind, "rl: kto\n"))


def test_the_table_names_options():
    assert set(OPTIONS.values()) <= PreferenceConfig.model_fields.keys()
