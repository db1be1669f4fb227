"""ms-swift's keys in YAML, in its args.json and on its command line, and its defaults."""

import json

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.config.migrate.ms_swift import METHOD_KEYS, SAME
from lorasmith.errors import ConfigError
from tests.support.migrating import MS_SWIFT, converted, is_option

MORE = """
lora_rank: 16
lora_alpha: 64
lora_dropout: 0
max_length: 4096
truncation_strategy: left
loss_scale: last_round
system: Be kind.
template: qwen3
split_dataset_ratio: 0.02
torch_dtype: bfloat16
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
num_train_epochs: 2
learning_rate: 5e-5
warmup_ratio: 0.05
save_steps: 40
output_dir: output
model_author: us
packing: true
attn_impl: flash_attn
logging_steps: 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_kind_of_key(tmp_path):
    config, done = converted(tmp_path, MS_SWIFT + MORE)
    lora, data, training = config.lora, config.data, config.training
    assert (config.model.model, config.model.dtype, config.output) == ("modelscope:org/base", "bfloat16", "output")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 64, 0, "all-linear")
    assert (data.data, data.held_out, data.max_length) == (("modelscope:org/rows",), 0.02, 4096)
    assert (data.too_long, data.learn, data.system, data.template) == (
        "truncate-left", "last-answer", "Be kind.", "model",
    )  # fmt: skip
    assert (training.batch_size, training.accumulate, training.epochs) == (2, 3, 2)
    assert (training.learning_rate, training.schedule, training.warmup) == (5e-5, "cosine", 0.05)
    assert (training.save_every, training.eval_every) == (40, 40)  # evaluations follow the checkpoints
    assert "from save_steps" in done.comments["training.eval_every"]
    assert set(done.unmatched) == {"packing: true"}
    assert config.data.fill == {"AUTHOR": "us"}


def test_what_is_not_set_has_their_default(tmp_path):
    config, done = converted(tmp_path, MS_SWIFT)
    training = config.training
    assert (training.batch_size, training.accumulate, training.epochs) == (1, 16, 3)
    assert (training.learning_rate, training.weight_decay, training.beta2) == (1e-4, 0.1, 0.95)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (8, 32, 0.05)
    assert (config.data.too_long, training.eval_every, training.warmup) == ("drop", 0, 0)
    assert set(done.unmatched) == {"max_length: not set"}
    batch = converted(tmp_path, MS_SWIFT + "per_device_train_batch_size: 3\n")[0].training
    assert (batch.batch_size, batch.accumulate) == (3, 6)


@pytest.mark.parametrize("key", METHOD_KEYS)
def test_full_fine_tuning(tmp_path, key):
    config, done = converted(tmp_path, MS_SWIFT.replace("tuner_type: lora", f"{key}: full\nlora_rank: 64"))
    assert (config.training.method, config.training.learning_rate, config.lora) == ("full", 1e-5, LoraConfig())
    assert done.comments["training.method"] == f"from {key}"
    assert done.no_effect == {"options of methods that are switched off": ["lora_rank", "target_modules"]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tuner_type: adalora", "lorasmith trains LoRA adapters (and DoRA) or all weights"),
        ("task_type: seq_cls", "lorasmith trains models that generate text, for no other task"),
        ("quant_bits: 2", "lorasmith quantizes a base model to NF4 or int8 with bitsandbytes"),
        ("optimizer: galore", "lorasmith does not have this optimizer"),
        ("loss_type: cosine", "lorasmith does not have this loss"),
        ("adapters: [old, older]", "lorasmith cannot start from this"),
        ("cached_dataset: folder", "cannot read this kind of dataset"),
    ],
)
def test_what_changes_the_meaning_is_refused(tmp_path, line, words):
    key = line.partition(":")[0]
    text = "\n".join(old for old in MS_SWIFT.splitlines() if old.partition(":")[0] != key)
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, f"{text}\n{line}\nsplit_dataset_ratio: 0.1\n")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("hf::org/a", "org/a"),
        ("MS::org/a", "modelscope:org/a"),
        ("org/a:en", "modelscope:org/a:en"),
        ("org/a:default", "modelscope:org/a"),
        ("here.jsonl", "here.jsonl"),
        ("./missing.jsonl", "./missing.jsonl"),
        ("missing.jsonl", "missing.jsonl"),
    ],
)
def test_names_of_datasets(tmp_path, name, ours):
    (tmp_path / "here.jsonl").write_text("", "utf-8")
    config, done = converted(tmp_path, MS_SWIFT.replace("org/rows", f"'{name}'"))
    assert config.data.data == (ours,)
    assert set(done.unmatched) == {"max_length: not set"}


def test_parts_of_datasets(tmp_path):
    config, done = converted(tmp_path, MS_SWIFT.replace("org/rows", "['org/a#500', 'org/b:all']\nuse_hf: true"))
    assert config.model.model == "org/base"
    assert config.data.data == ("org/a#500", "org/b")
    assert "dataset: org/b:all" in done.unmatched


@pytest.mark.parametrize("start", ["USE_HF=1 ", "export USE_HF=1\n"])
def test_the_hub_that_the_environment_chooses(tmp_path, start):
    command = "swift sft --model org/base --dataset org/rows ms::org/more --max_length 9"
    config, _done = converted(tmp_path, start + command, "train.sh")
    assert (config.model.model, config.data.data) == ("org/base", ("org/rows", "modelscope:org/more"))
    config, _done = converted(tmp_path, command, "train.sh")
    assert (config.model.model, config.data.data[0]) == ("modelscope:org/base", "modelscope:org/rows")


def test_columns_and_held_out_files(tmp_path):
    (tmp_path / "valid.jsonl").write_text("", "utf-8")
    more = """columns: '{"ask": "query", "reply": "response", "score": "rating"}'\nval_dataset: valid.jsonl\n"""
    config, done = converted(tmp_path, MS_SWIFT + more)
    assert config.data.map == {"instruction": "ask", "output": "reply"}
    assert config.data.held_out == "valid.jsonl"
    assert "columns: {ask, reply, score}" in done.unmatched


def test_the_file_of_arguments(tmp_path):
    values = {
        "model": "org/base", "tuner_type": "lora", "target_modules": ["q_proj", "v_proj"], "dataset": ["org/rows"],
        "split_dataset_ratio": 0.0, "swift_version": "4.0.0", "galore_rank": 128, "adapter_length": 128,
        "use_dora": False, "init_weights": True, "max_length": None, "adapters": [], "temperature": 0.0,
        "training_args": {"a": 1}, "lora_bias": "none", "max_steps": -1, "router_aux_loss_coef": 0.0,
    }  # fmt: skip
    config, done = converted(tmp_path, json.dumps(values), "args.json")
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert set(done.unmatched) == {"max_length: not set"}
    assert done.no_effect["options of methods that are switched off"] == ["galore_rank", "adapter_length"]
    assert done.off == ["router_aux_loss_coef"]


def test_the_command_for_plain_text(tmp_path):
    config, done = converted(tmp_path, "swift pt --model org/base --dataset org/rows --max_length 512", "train.sh")
    assert (config.data.learn, config.data.template, config.data.max_length) == ("all", "auto", 512)
    assert not done.unmatched


def test_several_processes_and_megatron(tmp_path):
    script = "NPROC_PER_NODE=2 swift sft --model org/base --dataset org/rows --tuner_type lora --max_length 9"
    _config, done = converted(tmp_path, script, "train.sh")
    assert "multiply training.accumulate by it" in done.unmatched["nproc_per_node: 2"]
    with pytest.raises(ConfigError, match="lorasmith does not read configurations of Megatron-SWIFT"):
        converted(tmp_path, MS_SWIFT + "global_batch_size: 16\n")


def test_a_system_message_in_a_file(tmp_path):
    (tmp_path / "system.txt").write_text("Be kind.", "utf-8")
    assert converted(tmp_path, MS_SWIFT + "system: system.txt\n")[0].data.system == "Be kind."


def test_thinking_is_switched_as_in_their_template(tmp_path):
    config, done = converted(tmp_path, MS_SWIFT + "enable_thinking: false\n")
    assert config.data.template_kwargs == {"enable_thinking": False}
    assert set(done.unmatched) == {"max_length: not set"}
    text = "swift pt --model org/base --dataset org/rows --max_length 512 --enable_thinking false"
    assert converted(tmp_path, text, "train.sh")[0].data.template_kwargs == {}


def test_weights_of_the_loss_and_modules(tmp_path):
    more = "loss_scale: last_round+hermes\ntarget_regex: '.*q_proj'\n"
    more += "init_weights: lora-ga\ntrain_dataloader_shuffle: false\n"
    config, done = converted(tmp_path, MS_SWIFT + more)
    assert (config.data.learn, config.lora.target_modules) == ("last-answer", ".*q_proj")
    assert {"loss_scale: hermes", "init_weights: lora-ga", "train_dataloader_shuffle: false"} <= set(done.unmatched)
    for start in ("gaussian", "pissa_niter_4", "olora"):
        assert converted(tmp_path, MS_SWIFT + f"init_weights: {start}\n")[0].lora.init_lora_weights == start


def test_a_service_that_keeps_everything_here(tmp_path):
    lines = "report_to: swanlab\nswanlab_mode: local\nswanlab_project: mine\nswanlab_exp_name: a\n"
    config, done = converted(tmp_path, MS_SWIFT + lines)
    assert config.training.report_to == ()
    assert {"swanlab_mode: local", "swanlab_project: mine"} <= set(done.unmatched)
    command = "swift sft --model org/base --dataset org/rows --report_to wandb --max_length 9"
    for variable, told in (("WANDB_MODE=offline", 1), ("WANDB_DISABLED=true", 0)):
        config, done = converted(tmp_path, f"export {variable}\n{command}", "train.sh")
        assert (config.training.report_to, len(done.unmatched)) == ((), told)


def test_names_in_two_languages(tmp_path):
    config, done = converted(tmp_path, MS_SWIFT + "model_name: [小黄, Xiao Huang]\nmodel_author: [us, us]\n")
    assert config.data.fill == {"NAME": "Xiao Huang", "AUTHOR": "us"}
    assert set(done.unmatched) == {"max_length: not set", "model_name: 小黄"}


def test_modules_beside_all_linear_layers(tmp_path):
    text = MS_SWIFT.replace("target_modules: all-linear", "target_modules: [all-linear, embed_tokens]")
    config, done = converted(tmp_path, text)
    assert config.lora.target_modules == "all-linear"
    assert "target_modules: embed_tokens" in done.unmatched


def test_the_table_names_options():
    assert all(map(is_option, SAME.values()))


@pytest.mark.parametrize("more", ["", "optimizer: lorap\n"])
def test_lora_plus(tmp_path, more):
    config, done = converted(tmp_path, MS_SWIFT + "lorap_lr_ratio: 16\n" + more)
    assert config.training.loraplus_lr_ratio == 16
    assert not [key for key in done.unmatched if "lorap" in key]
