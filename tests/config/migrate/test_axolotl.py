"""Axolotl's keys, its defaults, and the types of its datasets."""

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.config.migrate.axolotl import SAME
from lorasmith.errors import ConfigError
from tests.support.migrating import AXOLOTL, converted, is_option

MORE = """
lora_dropout: 0.1
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
peft_use_rslora: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
learning_rate: 0.0002
optimizer: adamw_bnb_8bit
lr_scheduler: linear
warmup_steps: 10
weight_decay: 0.01
max_grad_norm: 0.3
val_set_size: 0.05
evals_per_epoch: 4
saves_per_epoch: 1
output_dir: ./out
gradient_checkpointing: offload
excess_length_strategy: truncate
train_on_inputs: true
sample_packing: true
special_tokens:
  pad_token: <pad>
  eos_token: <end>
chat_template: llama3
wandb_project: mine
bf16: auto
dataset_prepared_path: last_run
lora_fan_in_fan_out:
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dataset(*lines: str) -> str:
    return AXOLOTL[: AXOLOTL.index("  - path")] + "  - " + "\n    ".join(lines) + "\n"


def test_every_kind_of_key(tmp_path):
    config, done = converted(tmp_path, AXOLOTL + MORE)
    lora, data, training = config.lora, config.data, config.training
    assert (config.model.model, config.output) == ("org/base", "./out")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (16, 32, 0.1, True)
    assert (lora.target_modules, lora.modules_to_save) == ("all-linear", ("embed_tokens",))
    assert (data.data, data.held_out, data.max_length) == (("org/rows",), 0.05, 2048)
    assert (data.too_long, data.template, data.learn) == ("truncate", "model", "all")
    assert (training.batch_size, training.accumulate, training.epochs) == (2, 4, 4)
    assert (training.learning_rate, training.schedule, training.warmup) == (2e-4, "linear", 10)
    assert (training.weight_decay, training.clip, training.save_every) == (0.01, 0.3, "epoch")
    assert training.gradient_checkpointing
    assert done.comments["data.template"].startswith("from chat_template: llama3; ")
    assert set(done.unmatched) == {
        "wandb_project: mine", "evals_per_epoch: 4", "sample_packing: true", "special_tokens.eos_token: <end>",
    }  # fmt: skip
    assert "bf16" in done.no_effect["speed, memory and processes, which lorasmith chooses itself"]


def test_what_is_not_set_has_their_default(tmp_path):
    config, _done = converted(tmp_path, AXOLOTL.replace("sequence_len: 2048", "learning_rate: 1e-3"))
    assert (config.data.max_length, config.data.held_out, config.data.too_long) == (512, 0, "drop")
    assert (config.training.batch_size, config.training.epochs) == (1, 1)
    assert (config.training.schedule, config.training.warmup, config.training.learning_rate) == ("cosine", 0.03, 1e-3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qat: true", "lorasmith quantizes a base model to NF4 or int8 with bitsandbytes, and in no other way"),
        ("adapter: llama-adapter", "lorasmith trains LoRA adapters (and DoRA) or all weights"),
        ("lora_model_dir: [old, older]", "lorasmith cannot start from this"),
        ("qat:\n  weight_dtype: int4", "qat: {weight_dtype}: lorasmith quantizes a base model"),
        ("lisa_n_layers: 4", "lisa_n_layers: 4: lorasmith trains LoRA adapters (and DoRA) or all weights"),
        ("use_eaft: true", "use_eaft: true: lorasmith does not have this loss"),
        ("unfrozen_parameters: [lm_head]", "lorasmith trains LoRA adapters (and DoRA) or all weights"),
        ("optimizer: galore_adamw", "optimizer: galore_adamw: lorasmith does not have this optimizer"),
        ("pretraining_dataset: org/text", "cannot read this kind of dataset"),
    ],
)
def test_what_changes_the_meaning_is_refused(tmp_path, line, words):
    key = line.partition(":")[0]
    text = "\n".join(old for old in AXOLOTL.splitlines() if old.partition(":")[0] != key)
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, f"{text}\n{line}\n")
    assert words in str(caught.value)


def test_a_quantized_base_stays_quantized_unless_the_command_says_otherwise(tmp_path):
    text = AXOLOTL.replace("adapter: lora", "adapter: qlora") + "load_in_4bit: true\n"
    config, done = converted(tmp_path, text)
    assert config.model.quantize == "nf4"
    assert not done.unmatched
    config, done = converted(tmp_path, text, given={"model": {"quantize": "none"}})
    assert config.model.quantize == "none"
    assert set(done.unmatched) == {"adapter: qlora", "load_in_4bit: true"}


def test_plugins_that_only_make_it_faster_are_not_needed(tmp_path):
    more = "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_rope: true\n"
    assert not converted(tmp_path, AXOLOTL + more)[1].unmatched
    _config, done = converted(tmp_path, AXOLOTL + "plugins: [mine.LigerPlugin, mine.Other]\n")
    assert set(done.unmatched) == {"plugins: mine.LigerPlugin, mine.Other"}


def test_services_and_their_projects(tmp_path):
    config, done = converted(tmp_path, AXOLOTL + "wandb_project: mine\nuse_mlflow: true\nuse_comet: true\n")
    assert config.training.report_to == ("wandb", "mlflow")
    assert set(done.unmatched) == {"wandb_project: mine", "use_comet: true"}


@pytest.mark.parametrize(("mode", "told"), [
    ("disabled", set()),
    ("offline", {"wandb_mode: offline", "wandb_project: mine"}),
    ("dryrun", {"wandb_mode: dryrun", "wandb_project: mine"}),
])  # fmt: skip
def test_a_service_that_is_switched_off_gets_nothing(tmp_path, mode, told):
    lines = f"wandb_project: mine\nuse_wandb: true\nwandb_mode: {mode}\n"
    config, done = converted(tmp_path, AXOLOTL + lines)
    assert (config.training.report_to, set(done.unmatched)) == ((), told)
    assert not told or f"WANDB_MODE={mode}" in done.unmatched[f"wandb_mode: {mode}"]
    assert told or "wandb_project" in done.no_effect["options of methods that are switched off"]
    assert converted(tmp_path, AXOLOTL + "wandb_project: a\nwandb_mode: online\n")[0].training.report_to == ("wandb",)


@pytest.mark.parametrize("adapter", ["", "adapter:\n"])
def test_full_fine_tuning(tmp_path, adapter):
    config, done = converted(tmp_path, AXOLOTL.replace("adapter: lora\n", adapter))
    assert (config.training.method, config.lora) == ("full", LoraConfig())
    assert done.comments["training.method"] == "not set in the file; this is the default of Axolotl"
    assert done.no_effect == {"options of methods that are switched off": ["lora_alpha", "lora_r"]}


@pytest.mark.parametrize(
    ("lines", "template", "columns"),
    [
        (["path: org/a", "type: alpaca"], "alpaca", {}),
        (["path: org/a", "type: completion", "field: body"], "auto", {"text": "body"}),
        (["path: org/a", "type: completion"], "auto", {}),
        (["path: org/a", "type: sharegpt"], "model", {}),
        (["path: org/a", "type: chat_template", "field_messages: conversations"], "model", {}),
        (["path: org/a", "type: chat_template", "field_messages: talk", "field_tools: fns"], "model",
         {"conversations": "talk", "tools": "fns"}),
        (["path: org/a", "type: chat_template", "chat_template: chatml"], "chatml", {}),
    ],
)  # fmt: skip
def test_types_of_datasets(tmp_path, lines, template, columns):
    config, done = converted(tmp_path, dataset(*lines))
    assert (config.data.data, config.data.template, config.data.map) == (("org/a",), template, columns)
    assert not done.unmatched


def test_what_a_dataset_asks_for_beyond_that_is_told(tmp_path):
    _config, done = converted(
        tmp_path,
        dataset(
            "path: org/a", "name: en", "type: chat_template", "split: train[:5%]", "roles_to_train: [user]",
            "message_property_mappings: {role: speaker, content: value}", "roles: {user: [human, customer]}",
            "train_on_eos: last", "drop_system_message: true", "field_thinking: thinking",
        ),
    )  # fmt: skip
    assert set(done.unmatched) == {
        "datasets[1].split: train[:5%]",
        "datasets[1].roles_to_train: user",
        "datasets[1].message_property_mappings.role: speaker",
        "datasets[1].roles.user: customer",
        "datasets[1].train_on_eos: last",
        "datasets[1].drop_system_message: true",
    }
    assert _config.data.data == ("org/a:en",)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["path: org/a", "type: alpaca:phi"], "org/a: alpaca:phi: lorasmith does not know this prompt format"),
        (["path: org/a", "type: {field_output: x}"], "lorasmith does not know this prompt format"),
        (["path: s3://bucket/a", "type: alpaca"], "cannot read this kind of dataset"),
        (["type: alpaca"], "cannot read this kind of dataset"),
        (["path: org/a", "type: alpaca", "", "- path: org/b", "  type: chat_template"], "need different templates"),
    ],
)
def test_datasets_that_are_refused(tmp_path, lines, words):
    text = dataset(*lines).replace("    - path", "  - path").replace("      type", "    type")
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, text)
    assert words in str(caught.value)


def test_a_number_of_rows(tmp_path):
    config, done = converted(tmp_path, dataset("path: org/a", "type: alpaca", "split: train[:500]"))
    assert (config.data.data, done.unmatched) == (("org/a#500",), {})
    assert "lorasmith draws them at random" in done.comments["data.data"]


def test_a_held_out_part_does_not_become_the_training_rows(tmp_path):
    more = "test_datasets:\n  - path: org/a\n    type: alpaca\n    split: train[500:600]\n"
    config, done = converted(tmp_path, dataset("path: org/a", "type: alpaca", "split: train[:500]") + more)
    assert (config.data.data, config.data.held_out) == (("org/a#500",), 0.0)
    assert set(done.unmatched) == {"test_datasets[1].split: train[500:600]"}


def test_modules_beside_all_linear_layers(tmp_path):
    linear = AXOLOTL + "lora_target_linear: true\nlora_target_modules: "
    config, done = converted(tmp_path, linear + "[q_proj, embed_tokens]\n")
    assert (config.lora.target_modules, set(done.unmatched)) == ("all-linear", {"lora_target_modules: embed_tokens"})
    assert not converted(tmp_path, linear + "[q_proj, v_proj]\n")[1].unmatched


def test_a_dataset_that_is_named_twice(tmp_path):
    text = AXOLOTL + "  - path: org/rows\n    type: chat_template\n"
    assert set(converted(tmp_path, text)[1].unmatched) == {"datasets: org/rows"}


def test_files_that_are_here(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "chat.jinja"):
        (tmp_path / name).write_text("", "utf-8")
    text = dataset("path: json", "data_files: [a.jsonl]", "type: chat_template")
    more = "chat_template: jinja\nchat_template_jinja: chat.jinja\n"
    config, done = converted(tmp_path, text + f"test_datasets:\n  - path: ./b.jsonl\n    type: chat_template\n{more}")
    assert (config.data.data, config.data.held_out) == (("a.jsonl",), "b.jsonl")
    assert config.data.template == "chat.jinja"
    assert not done.unmatched
    _config, done = converted(tmp_path, text + "chat_template: jinja\nchat_template_jinja: '{{ messages }}'\n")
    assert set(done.unmatched) == {"chat_template_jinja: {{ messages }}"}


def test_evaluations_and_patience(tmp_path):
    config, _done = converted(tmp_path, AXOLOTL + "val_set_size: 40\neval_steps: 20\nearly_stopping_patience: 3\n")
    assert (config.data.held_out, config.training.eval_every, config.training.patience) == (40, 20, 3)
    _config, done = converted(tmp_path, AXOLOTL + "early_stopping_patience: 3\n")
    assert "it counts evaluations" in done.unmatched["early_stopping_patience: 3"]


def test_the_table_names_options():
    assert all(map(is_option, SAME.values()))


def test_lora_plus(tmp_path):
    config, done = converted(tmp_path, AXOLOTL + "loraplus_lr_ratio: 16\n")
    assert config.training.loraplus_lr_ratio == 16
    assert "from loraplus_lr_ratio" in done.comments["training.loraplus_lr_ratio"]
