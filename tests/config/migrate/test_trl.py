"""TRL's keys and defaults, which trainer a file is for, and the options of its losses."""

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.config.migrate.trl import PREFERENCE, SAME
from lorasmith.config.preference import PreferenceConfig
from lorasmith.errors import ConfigError
from tests.support.migrating import TRL, converted, is_option

NOTHING_SAID = """
model_name_or_path: org/base
dataset_name: org/rows
"""
COMMAND = "trl {} --model_name_or_path org/base --dataset_name org/rows --use_peft --lora_target_modules all-linear"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_kind_of_key(tmp_path):
    more = """
lora_r: 32
lora_alpha: 16
lora_dropout: 0.1
dataset_config: en
dtype: bfloat16
max_length: 2048
truncation_mode: keep_end
learning_rate: 2e-4
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
gradient_checkpointing: false
lr_scheduler_type: cosine
load_in_4bit: true
bnb_4bit_quant_type: nf4
packing: true
eos_token: <|im_end|>
attn_implementation: flash_attention_2
model_revision: main
push_to_hub: true
trust_remote_code: true
router_aux_loss_coef: 0.01
"""
    config, done = converted(tmp_path, TRL + more)
    assert (config.model.model, config.model.dtype, config.model.quantize) == ("org/base", "bfloat16", "nf4")
    lora, data, training = config.lora, config.data, config.training
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (32, 16, 0.1, "all-linear")
    assert (data.data, data.learn, data.max_length) == (("org/rows:en",), "answers", 2048)
    assert (data.too_long, training.method, training.learning_rate) == ("truncate-left", "lora", 2e-4)
    assert (training.batch_size, training.accumulate, training.schedule) == (2, 4, "cosine")
    assert not training.gradient_checkpointing
    assert set(done.unmatched) == {"packing: true", "trust_remote_code: true", "router_aux_loss_coef: 0.01"}


def test_what_is_not_set_has_their_default(tmp_path):
    config, done = converted(tmp_path, NOTHING_SAID + "use_peft: true\n")
    lora, data, training = config.lora, config.data, config.training
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.05)
    assert (data.max_length, data.held_out, data.too_long) == (1024, 0, "truncate")
    assert (training.learning_rate, training.epochs, training.log_every, training.batch_size) == (2e-5, 3, 10, 8)
    assert training.gradient_checkpointing
    told = {"trl: not set", "lora_target_modules: not set", "assistant_only_loss: not set"}
    assert set(done.unmatched) == told
    assert "SFT is assumed" in done.unmatched["trl: not set"]


@pytest.mark.parametrize("line", ["", "use_peft: false\n"])
def test_without_peft_all_weights_are_trained(tmp_path, line):
    config, done = converted(tmp_path, NOTHING_SAID + line + "lora_r: 8\npacking: true\n")
    assert (config.training.method, config.lora) == ("full", LoraConfig())
    assert done.no_effect["options of methods that are switched off"] == ["lora_r"]
    assert set(done.unmatched) == {"assistant_only_loss: not set", "packing: true"}


@pytest.mark.parametrize(
    ("verb", "flags", "method", "options"),
    [
        ("dpo", "", "dpo", {"beta": 0.1}),
        ("dpo", "--beta 0.3 --label_smoothing 0.1 --loss_type sigmoid sft --loss_weights 1 0.5", "dpo",
         {"beta": 0.3, "label_smoothing": 0.1, "rpo_alpha": 0.5}),
        ("kto", "--desirable_weight 0.4 --loss_type kto", "kto", {"beta": 0.1, "desirable_weight": 0.4}),
    ],
)  # fmt: skip
def test_preferences(tmp_path, verb, flags, method, options):
    config, done = converted(tmp_path, f"{COMMAND.format(verb)} {flags}", "train.sh")
    assert (config.training.method, config.preference) == (method, PreferenceConfig(**options))
    assert (config.training.learning_rate, config.data.too_long) == (1e-6, "truncate")
    assert not done.unmatched


@pytest.mark.parametrize(
    ("script", "flags", "method", "options"),
    [
        ("trl/scripts/dpo.py", "--f_divergence_type reverse_kl", "dpo", {"beta": 0.1}),
        ("examples/scripts/orpo.py", "--beta 0.2", "orpo", {"beta": 0.2}),
        ("examples/scripts/cpo.py", "--loss_type simpo", "simpo", {"beta": 0.1, "gamma": 0.5, "rpo_alpha": 1}),
        ("examples/scripts/cpo.py", "--loss_type simpo --cpo_alpha 0 --beta 2 --simpo_gamma 1.2", "simpo",
         {"beta": 2, "gamma": 1.2}),
    ],
)  # fmt: skip
def test_scripts_of_trl(tmp_path, script, flags, method, options):
    start = f"accelerate launch --num_processes 4 {script}"
    config, done = converted(tmp_path, f"{COMMAND.replace('trl {}', start)} {flags}", "train.sh")
    assert (config.training.method, config.preference) == (method, PreferenceConfig(**options))
    assert set(done.unmatched) == {"nproc_per_node: 4"}


@pytest.mark.parametrize(
    ("lines", "method", "told"),
    [
        ("beta: 0.1", "dpo", "DPO is assumed"),  # which may also be one for ORPO
        ("loss_type: sigmoid", "dpo", ""),
        ("desirable_weight: 2\nbeta: 0.1", "kto", ""),
        ("cpo_alpha: 0\nloss_type: simpo", "simpo", ""),
        ("packing: false", "lora", ""),
    ],
)
def test_the_trainer_that_a_file_is_for(tmp_path, lines, method, told):
    text = TRL.replace("assistant_only_loss: true", lines)
    config, done = converted(tmp_path, text)
    assert config.training.method == method
    assert told in done.unmatched.get("trl: not set", "")
    assert bool(told) == ("trl: not set" in done.unmatched)


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("dpo", "--loss_type ipo", "loss_type: ipo: lorasmith does not have this loss"),
        ("dpo", "--f_divergence_type js_divergence", "f_divergence_type: js_divergence: lorasmith does not have"),
        ("dpo", "--sync_ref_model", "sync_ref_model: true: the reference of lorasmith is the model as it is"),
        ("dpo", "--use_peft false", "trl: dpo: lorasmith trains an adapter on preferences, not all weights"),
        ("sft", "--loss_type dft", "loss_type: dft: lorasmith does not have this loss"),
        ("sft", "--lora_task_type SEQ_CLS", "lora_task_type: SEQ_CLS: lorasmith trains models that generate text"),
        ("sft", "--reward_funcs mine", "reward_funcs: mine: lorasmith trains on examples, or on preferences"),
    ],
)
def test_what_is_refused(tmp_path, verb, flags, words):
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, f"{COMMAND.format(verb)} {flags}", "train.sh")
    assert words in str(caught.value)


def test_cpo_itself_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="loss_type: sigmoid: lorasmith does not have this loss"):
        converted(tmp_path, COMMAND.replace("trl {}", "python examples/scripts/cpo.py"), "train.sh")


def test_mixtures_of_datasets(tmp_path):
    (tmp_path / "b.jsonl").write_text("{}", "utf-8")
    mixture = """
test_split_size: 0.1
datasets:
  - path: org/a
    name: en
    split: train[:50]
    columns: [messages]
  - path: json
    data_files: b.jsonl
    fraction: 0.5
"""
    text = TRL.replace("dataset_name: org/rows", "eval_strategy: epoch") + mixture
    config, done = converted(tmp_path, text)
    assert (config.data.data, config.data.held_out) == (("org/a:en#50", "b.jsonl"), 0.1)
    assert set(done.unmatched) == {"datasets[2].fraction: 0.5"}
    with pytest.raises(ConfigError, match=r"dataset_mixture: \{datasets\}: lorasmith cannot read this kind of dataset"):
        converted(tmp_path, TRL + "dataset_mixture:\n  datasets: []\n")


def test_splits_and_columns(tmp_path):
    more = "dataset_train_split: train_sft\neval_strategy: epoch\ndataset_text_field: body\n"
    config, done = converted(tmp_path, TRL + more)
    assert (config.data.map, config.training.eval_every) == ({"text": "body"}, "epoch")
    assert set(done.unmatched) == {"dataset_train_split: train_sft", "dataset_test_split: test"}


@pytest.mark.parametrize(
    ("lines", "learn", "told"),
    [
        ("assistant_only_loss: true", "answers", set()),
        ("completion_only_loss: true", "answers", set()),
        ("completion_only_loss: false", "all", set()),
        ("assistant_only_loss: false", "answers", {"assistant_only_loss: false"}),
    ],
)
def test_what_is_learned(tmp_path, lines, learn, told):
    config, done = converted(tmp_path, TRL.replace("assistant_only_loss: true", lines))
    assert (config.data.learn, set(done.unmatched)) == (learn, told)


def test_templates(tmp_path):
    (tmp_path / "chat.jinja").write_text("x", "utf-8")
    config, done = converted(tmp_path, TRL + "chat_template_path: chat.jinja\nchat_template: '{{ messages }}'\n")
    assert config.data.template == "chat.jinja"
    assert set(done.unmatched) == {"chat_template: {{ messages }}"}
    config, done = converted(tmp_path, TRL + "beta: 0.1\nloss_type: sigmoid\ntruncation_mode: keep_end\n")
    assert (config.data.too_long, set(done.unmatched)) == ("truncate", {"truncation_mode: keep_end"})


def test_the_tables_name_options():
    assert all(map(is_option, SAME.values()))
    assert set(PREFERENCE.values()) <= PreferenceConfig.model_fields.keys()
