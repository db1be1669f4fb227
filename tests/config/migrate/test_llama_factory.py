"""LLaMA-Factory's keys, its defaults, and the datasets that dataset_info.json describes."""

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.config.migrate.llama_factory import SAME
from lorasmith.config.preference import PreferenceConfig
from lorasmith.errors import ConfigError
from tests.support.migrating import LLAMA_FACTORY, converted, described, is_option

MORE = """
lora_rank: 4
lora_dropout: 0.05
additional_target: embed_tokens,lm_head
use_rslora: true
use_dora: true
cutoff_len: 4096
val_size: 0.1
default_system: Be kind.
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 2.5
max_steps: 300
lr_scheduler_type: cosine
warmup_ratio: 0.1
weight_decay: 0.01
max_grad_norm: 0.5
adam_beta2: 0.95
seed: 7
logging_steps: 10
save_steps: 200
eval_strategy: steps
eval_steps: 50
output_dir: saves/mine
report_to: [tensorboard, wandb]
optim: adamw_torch
trust_remote_code: true
bf16: true
preprocessing_num_workers: 16
plot_loss: true
packing: true
quantization_method: bnb
neftune_noise_alpha: 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    described(tmp_path)


def test_every_kind_of_key(tmp_path):
    config, done = converted(tmp_path, LLAMA_FACTORY.replace("lora_target: all", "lora_target: q_proj,v_proj") + MORE)
    lora, data, training = config.lora, config.data, config.training
    assert (config.model.model, config.output) == ("org/base", "saves/mine")
    assert not config.model.trust_remote_code
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 8, 0.05)  # alpha: twice the rank
    assert (lora.target_modules, lora.modules_to_save) == (("q_proj", "v_proj"), ("embed_tokens", "lm_head"))
    assert lora.use_rslora
    assert lora.use_dora
    assert (data.data, data.held_out, data.max_length) == (("data/mine.jsonl",), 0.1, 4096)
    assert (data.too_long, data.template, data.system, data.learn) == ("truncate", "model", "Be kind.", "answers")
    assert (training.batch_size, training.accumulate, training.epochs, training.max_steps) == (2, 8, 2.5, 300)
    assert (training.learning_rate, training.schedule, training.warmup) == (1e-4, "cosine", 0.1)
    assert (training.weight_decay, training.clip, training.beta2, training.seed) == (0.01, 0.5, 0.95, 7)
    assert (training.log_every, training.save_every, training.eval_every, training.tensorboard) == (10, 200, 50, True)
    assert done.comments["data.template"].startswith("from template: qwen3; ")
    keys = {key.partition(":")[0] for key in done.unmatched}
    assert keys == {"trust_remote_code", "packing", "neftune_noise_alpha"}
    assert config.training.report_to == ("wandb",)
    assert sorted(key for keys in done.no_effect.values() for key in keys) == [
        "bf16", "optim", "plot_loss", "preprocessing_num_workers", "quantization_method",
    ]  # fmt: skip


def test_what_is_not_set_has_their_default(tmp_path):
    config, done = converted(tmp_path, LLAMA_FACTORY)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.target_modules) == (8, 16, "all-linear")
    assert (config.training.learning_rate, config.training.epochs, config.training.warmup) == (5e-5, 3, 0)
    assert (config.training.schedule, config.training.eval_every, config.training.save_every) == ("linear", 0, 500)
    assert (config.data.max_length, config.data.held_out) == (2048, 0)
    assert done.comments["training.epochs"] == "not set in the file; this is the default of LLaMA-Factory"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("finetuning_type: freeze", "lorasmith trains LoRA adapters (and DoRA) or all weights"),
        ("stage: rm", "It has no reward models and no reinforcement learning"),
        ("quantization_bit: 2", "lorasmith quantizes a base model to NF4 or int8 with bitsandbytes"),
        ("use_apollo: true", "use_apollo: true: lorasmith does not have this optimizer"),
        ("optim: sgd", "optim: sgd: lorasmith does not have this optimizer"),
        ("train_from_scratch: true", "train_from_scratch: true: lorasmith trains LoRA adapters (and DoRA) or"),
        ("use_dft_loss: true", "lorasmith does not have this loss. Remove the key"),
        ("adapter_name_or_path: saves/old,saves/older", "lorasmith cannot start from this"),
        ("adapter_name_or_path: old\ncreate_new_adapter: true", "adapter_name_or_path: old: lorasmith does not train a "
         "second adapter on top of another (create_new_adapter). Merge this one with lorasmith merge"),
        ("dataset: other", "does not describe this dataset"),
        ("dataset_dir: elsewhere", "no dataset_info.json in elsewhere, "),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_is_refused(tmp_path, line, words):
    key = line.partition(":")[0]
    text = "\n".join(old for old in LLAMA_FACTORY.splitlines() if old.partition(":")[0] != key)
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, f"{text}\n{line}\n")
    assert words in str(caught.value)


def test_full_fine_tuning(tmp_path):
    text = LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: full")
    config, done = converted(tmp_path, text + "lora_rank: 64\nuse_dora: false\n")
    assert (config.training.method, config.training.learning_rate, config.lora) == ("full", 5e-5, LoraConfig())
    assert done.no_effect == {"options of methods that are switched off": ["lora_rank", "use_dora", "lora_target"]}
    assert not done.unmatched
    for line, words in (("quantization_bit: 4", "model.quantize: quantized weights cannot be trained"),
                        ("use_muon: true", "optimizer: 'muon' is only for adapters here"),
                        ("adapter_name_or_path: old", "training.start_from: only for adapters")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            converted(tmp_path, f"{text}{line}\n")


@pytest.mark.parametrize(
    ("lines", "method", "options"),
    [
        ("stage: dpo", "dpo", {"beta": 0.1}),
        ("stage: dpo\npref_beta: 0.3\npref_ftx: 0.5\ndpo_label_smoothing: 0.1\nsimpo_gamma: 1", "dpo",
         {"beta": 0.3, "rpo_alpha": 0.5, "label_smoothing": 0.1}),
        ("stage: dpo\npref_loss: orpo\npref_ftx: 0", "orpo", {"beta": 0.1}),
        ("stage: dpo\npref_loss: simpo", "simpo", {"beta": 0.1, "gamma": 0.5}),  # not our defaults
        ("stage: kto\nkto_chosen_weight: 2\nkto_rejected_weight: 3\npref_loss: sigmoid", "kto",
         {"beta": 0.1, "desirable_weight": 2, "undesirable_weight": 3}),
    ],
)  # fmt: skip
def test_preferences(tmp_path, lines, method, options):
    entry = '{"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "chosen": "good"}}'
    described(tmp_path, entry)
    config, done = converted(tmp_path, LLAMA_FACTORY.replace("stage: sft", lines))
    assert (config.training.method, config.preference) == (method, PreferenceConfig(**options))
    assert (config.training.learning_rate, config.data.map) == (5e-5, {"conversations": "m", "chosen": "good"})
    assert not done.unmatched


def test_preference_data_by_its_description(tmp_path):
    described(tmp_path, '{"file_name": "a.json", "columns": {"prompt": "q", "rejected": "no", "kto_tag": "good"}}')
    config, _done = converted(tmp_path, LLAMA_FACTORY.replace("stage: sft", "stage: kto"))
    assert config.data.map == {"instruction": "q", "rejected": "no", "kto_tag": "good"}


def test_another_loss_or_reference_is_refused_or_told(tmp_path):
    text = LLAMA_FACTORY.replace("stage: sft", "stage: dpo") + "adapter_name_or_path: old\n"
    for line in ("pref_loss: ipo", "pref_bco_weight: 1", "ld_alpha: 0.5", "pref_loss: orpo\npref_ftx: 1"):
        with pytest.raises(ConfigError, match="lorasmith does not have this loss"):
            converted(tmp_path, f"{text}{line}\n")
    with pytest.raises(ConfigError, match="lorasmith trains an adapter on preferences, not all weights"):
        converted(tmp_path, text.replace("finetuning_type: lora", "finetuning_type: full"))
    _config, done = converted(tmp_path, text)
    assert set(done.unmatched) == {"ref_model_adapters: not set"}
    _config, done = converted(tmp_path, text + "ref_model: org/base\nref_model_adapters: old\n")
    assert not done.unmatched
    with pytest.raises(ConfigError, match="ref_model: org/other: the reference of lorasmith is the model as it is"):
        converted(tmp_path, text + "ref_model: org/other\n")


@pytest.mark.parametrize(
    ("entry", "name", "columns"),
    [
        ('{"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "system": "s"}}', "data/a.json",
         {"instruction": "q", "output": "a", "system": "s"}),
        ('{"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "tools"}}',
         "data/a.json", {"conversations": "talk"}),
        ('{"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages"}}', "data/a.json", {}),
        ('{"file_name": "a.json", "columns": {"prompt": "q", "query": null, "images": null}}', "data/a.json",
         {"instruction": "q"}),
        ('{"hf_hub_url": "org/rows", "subset": "en"}', "org/rows:en", {}),
        ('{"ms_hub_url": "org/rows"}', "modelscope:org/rows", {}),
    ],
)  # fmt: skip
def test_datasets_that_are_described(tmp_path, entry, name, columns):
    described(tmp_path, entry)
    config, _done = converted(tmp_path, LLAMA_FACTORY)
    assert (config.data.data, config.data.map) == ((name,), columns)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"file_name": "a.json", "ranking": true}', "this is preference data"),
        ('{"file_name": "a.json", "columns": {"messages": "m", "images": "i"}}', "contains images, audio or video"),
        ('{"script_url": "a"}', "cannot read this kind of dataset"),
        ('{"file_name": "a.json", "columns": []}', "does not describe this dataset"),
    ],
)
def test_datasets_that_are_refused(tmp_path, entry, words):
    described(tmp_path, entry)
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, LLAMA_FACTORY)
    assert words in str(caught.value)
    config, _done = converted(tmp_path, LLAMA_FACTORY, given={"data": {"data": ["mine.jsonl"]}})
    assert config.data.data == ("mine.jsonl",)


def test_two_files_with_different_columns(tmp_path):
    entries = '{"file_name": "a.json", "columns": {"prompt": "q"}}, "more": {"file_name": "b.json", "columns": %s}'
    text = LLAMA_FACTORY.replace("dataset: mine", "dataset: mine, more")
    described(tmp_path, entries % '{"prompt": "ask"}')
    assert converted(tmp_path, text)[0].data.map == {"instruction": "q", "data/b.json:instruction": "ask"}
    described(tmp_path, entries % '{"prompt": "q", "response": "a"}')
    assert converted(tmp_path, text)[0].data.map == {"instruction": "q", "output": "a"}


def test_parts_of_datasets_and_other_tags_are_told(tmp_path):
    described(
        tmp_path,
        '{"file_name": "a.json", "formatting": "sharegpt", "split": "test", "folder": "x", '
        '"tags": {"role_tag": "role", "user_tag": "customer"}}',
    )
    _config, done = converted(tmp_path, LLAMA_FACTORY)
    assert {"mine.split: test", "mine.folder: x", "mine.tags.user_tag: customer"} == set(done.unmatched)


def test_what_a_description_asks_for_and_is_told(tmp_path):
    part = '"part": {"hf_hub_url": "org/rows", "split": "test"}'
    described(tmp_path, f'{{"file_name": "a.json", "columns": {{"tools": "functions"}}}}, {part[:-1]}}}')
    config, done = converted(tmp_path, LLAMA_FACTORY + "max_samples: 100\neval_dataset: part\n")
    assert (config.data.map, config.data.held_out, config.data.max_samples) == ({}, 0.0, 100)
    assert set(done.unmatched) == {"mine.columns.tools: functions", "part.split: test"}
    assert "lorasmith draws them at random" in done.comments["data.max_samples"]
    _config, done = converted(tmp_path, LLAMA_FACTORY.replace("dataset: mine", "dataset: mine,mine"))
    assert "dataset: data/a.json" in done.unmatched


def test_plain_text(tmp_path):
    described(tmp_path, '{"file_name": "a.json", "columns": {"prompt": "body"}}')
    config, done = converted(tmp_path, LLAMA_FACTORY.replace("stage: sft", "stage: pt"))
    assert (config.data.map, config.data.too_long, config.data.template) == ({"text": "body"}, "split", "auto")
    assert not done.unmatched


def test_held_out_files_and_what_is_learned(tmp_path):
    described(tmp_path, '{"file_name": "a.json"}, "more": {"file_name": "b.json"}, "third": {"file_name": "c.json"}')
    config, done = converted(tmp_path, LLAMA_FACTORY + "eval_dataset: more,third\ntrain_on_prompt: true\n")
    assert (config.data.held_out, config.data.learn) == ("data/b.json", "all")
    assert set(done.unmatched) == {"eval_dataset: data/b.json, data/c.json"}
    assert converted(tmp_path, LLAMA_FACTORY + "mask_history: true\n")[0].data.learn == "last-answer"


def test_an_adapter_to_start_from_and_other_optimizers(tmp_path):
    config, done = converted(
        tmp_path,
        LLAMA_FACTORY + "adapter_name_or_path: old\ncreate_new_adapter: false\nuse_muon: true\noptim: adamw_torch\n",
    )
    assert (config.training.start_from, config.training.optimizer) == ("old", "muon")
    assert not done.unmatched
    config, done = converted(tmp_path, LLAMA_FACTORY + "optim: adafactor\nadam_beta2: 0.95\n")
    assert (config.training.optimizer, config.training.beta2) == ("adafactor", 0.999)
    assert set(done.unmatched) == {"adam_beta2: 0.95"}  # which adafactor does not have


def test_names_of_a_hub(tmp_path):
    described(tmp_path, '{"hf_hub_url": "org/rows", "ms_hub_url": "us/rows"}')
    command = "llamafactory-cli train --model_name_or_path org/base --dataset mine"
    for start, model, rows in (("", "org/base", "org/rows"),
                               ("USE_MODELSCOPE_HUB=1 ", "modelscope:org/base", "modelscope:us/rows")):  # fmt: skip
        config, _done = converted(tmp_path, start + command, "train.sh")
        assert (config.model.model, config.data.data) == (model, (rows,))
    config, _done = converted(tmp_path, LLAMA_FACTORY.replace("dataset: mine", "dataset: org/a\ndataset_dir: ONLINE"))
    assert config.data.data == ("org/a",)


@pytest.mark.parametrize(("name", "ours"), [("chatml", "chatml"), ("alpaca", "alpaca"), ("default", "human-assistant")])
def test_templates_that_are_ours_too(tmp_path, name, ours):
    assert converted(tmp_path, LLAMA_FACTORY.replace("qwen3", name))[0].data.template == ours


def test_the_table_names_options():
    assert all(map(is_option, SAME.values()))


@pytest.mark.parametrize(("line", "start"), [("", "pissa_niter_16"), ("pissa_iter: 4\n", "pissa_niter_4"),
                                             ("pissa_iter: -1\n", "pissa")])  # fmt: skip
def test_pissa(tmp_path, line, start):
    config, done = converted(tmp_path, LLAMA_FACTORY + "pissa_init: true\npissa_convert: true\n" + line)
    assert config.lora.init_lora_weights == start
    assert not [key for key in done.unmatched if "pissa" in key]


def test_lora_plus(tmp_path):
    config, done = converted(tmp_path, LLAMA_FACTORY + "loraplus_lr_ratio: 16\n")
    assert config.training.loraplus_lr_ratio == 16
    assert "from loraplus_lr_ratio" in done.comments["training.loraplus_lr_ratio"]
