"""ms-swift's preferences: `swift rlhf`, its methods, and the options of the losses."""

import pytest

from lorasmith.config.migrate.ms_swift_preference import OPTIONS
from lorasmith.config.preference import PreferenceConfig
from lorasmith.errors import ConfigError
from tests.support.migrating import MS_SWIFT, converted


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


COMMAND = "swift rlhf --model org/base --dataset org/rows --target_modules all-linear --max_length 2048"


@pytest.mark.parametrize(
    ("flags", "method", "options"),
    [
        ("", "dpo", {"beta": 0.1}),
        ("--rlhf_type dpo --beta 0.3 --rpo_alpha 0.5 --label_smoothing 0.1", "dpo",
         {"beta": 0.3, "rpo_alpha": 0.5, "label_smoothing": 0.1}),
        ("--cpo_alpha 2", "dpo", {"beta": 0.1}),  # of another method
        ("--rlhf_type simpo --rpo_alpha 2", "simpo", {"beta": 2, "rpo_alpha": 1}),
        ("--loss_type sigmoid sft --loss_weights 1.0 0.2", "dpo", {"beta": 0.1, "rpo_alpha": 0.2}),
        ("--rlhf_type orpo --desirable_weight 3", "orpo", {"beta": 0.1}),
        ("--rlhf_type kto --desirable_weight 0.3 --loss_type kto", "kto", {"beta": 0.1, "desirable_weight": 0.3}),
        ("--rlhf_type simpo --simpo_gamma 0.5 --cpo_alpha 0", "simpo", {"beta": 2, "gamma": 0.5}),
        ("--rlhf_type cpo --loss_type simpo", "simpo", {"beta": 2, "rpo_alpha": 1}),  # as args.json has it
    ],
)  # fmt: skip
def test_methods_and_options(tmp_path, flags, method, options):
    config, done = converted(tmp_path, f"{COMMAND} {flags} --loss_scale last_round --vllm_mode server", "train.sh")
    assert (config.training.method, config.preference) == (method, PreferenceConfig(**options))
    assert (config.training.learning_rate, config.data.learn, config.data.too_long) == (1e-4, "answers", "drop")
    assert not done.unmatched


def test_a_file_and_the_module_that_is_run(tmp_path):
    assert converted(tmp_path, MS_SWIFT + "rlhf_type: kto\n")[0].training.method == "kto"
    command = COMMAND.replace("swift rlhf", "python swift/cli/rlhf.py")
    assert converted(tmp_path, command, "train.sh")[0].training.method == "dpo"


def test_the_adapter_to_start_from_is_the_reference(tmp_path):
    text = MS_SWIFT + "rlhf_type: dpo\nadapters: [old]\nmax_length: 9\nloss_scale: all\n"
    config, done = converted(tmp_path, text)
    assert config.training.start_from == "old"
    assert set(done.unmatched) == {"ref_adapters: not set", "loss_scale: all"}
    assert set(converted(tmp_path, text + "ref_adapters: [old]\n")[1].unmatched) == {"loss_scale: all"}
    with pytest.raises(ConfigError, match="ref_adapters: other: the reference of lorasmith is the model as it is"):
        converted(tmp_path, text + "ref_adapters: [other]\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rlhf_type cpo", "rlhf_type: cpo: lorasmith does not have this loss"),
        ("--rlhf_type grpo", "rlhf_type: grpo: lorasmith trains on examples, or on preferences with DPO, ORPO, KTO"),
        ("--loss_type hinge", "loss_type: hinge: lorasmith does not have this loss"),
        ("--loss_type sigmoid sft --loss_weights 2 1", "loss_weights: 2, 1: lorasmith does not have this loss"),
        ("--ld_alpha 0.5", "ld_alpha: 0.5: lorasmith does not have this loss"),
        ("--tuner_type full", "swift: dpo: lorasmith trains an adapter on preferences, not all weights"),
    ],
)
def test_what_is_refused(tmp_path, flags, words):
    with pytest.raises(ConfigError, match=words):
        converted(tmp_path, f"{COMMAND} {flags}", "train.sh")


def test_the_table_names_options():
    assert set(OPTIONS.values()) <= PreferenceConfig.model_fields.keys()
