"""mlx-lm's keys, its defaults, and its iterations as steps."""

import pytest

from lorasmith.config.lora import LoraConfig
from lorasmith.config.migrate.mlx_lm import SAME
from lorasmith.errors import ConfigError
from tests.support.migrating import MLX_LM, converted, is_option

MORE = """
num_layers: -1
batch_size: 2
grad_accumulation_steps: 4
learning_rate: 1e-4
max_seq_length: 1024
steps_per_eval: 200
steps_per_report: 2
save_every: 100
adapter_path: adapters
seed: 3
grad_checkpoint: true
mask_prompt: true
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    weight_decay: 0.05
  muon:
    momentum: 0.9
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 4
  scale: 10.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 30
  arguments: [2e-4, 120, 1e-6]
val_batches: 25
test: false
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_kind_of_key(tmp_path):
    config, done = converted(tmp_path, MLX_LM + MORE)
    lora, data, training = config.lora, config.data, config.training
    assert (config.model.model, config.output) == ("org/base", "adapters")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 40, 0.1)  # their scale is alpha / r
    assert lora.scaling(lora.r, lora.lora_alpha) == 10.0
    assert lora.target_modules == ("self_attn.q_proj", "self_attn.v_proj")
    assert (data.data, data.learn, data.max_length, data.too_long) == (("org/rows",), "last-answer", 1024, "truncate")
    assert (training.batch_size, training.accumulate, training.seed) == (2, 4, 3)
    assert (training.max_steps, training.eval_every, training.save_every, training.log_every) == (150, 50, 25, 1)
    assert (training.learning_rate, training.schedule, training.warmup, training.clip) == (2e-4, "cosine", 30, 0)
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.98, 0.05)
    assert training.gradient_checkpointing
    assert training.min_learning_rate == 1e-6
    assert lora.last_layers is None
    assert not done.unmatched
    assert done.no_effect["options of methods that are switched off"] == ["optimizer_config.muon"]


def test_what_is_not_set_has_their_default(tmp_path):
    config, done = converted(tmp_path, MLX_LM)
    training = config.training
    assert (config.lora.r, config.lora.lora_alpha, config.lora.target_modules) == (8, 160, "all-linear")
    assert (training.max_steps, training.batch_size, training.learning_rate) == (600, 4, 1e-5)
    assert (training.schedule, training.warmup, training.weight_decay, training.clip) == ("constant", 0, 0, 0)
    assert (training.save_every, training.log_every, training.eval_every) == (100, 10, 0)  # nothing is held out
    assert (config.data.learn, config.data.max_length) == ("all", 2048)  # without mask_prompt, all is learned
    assert config.lora.last_layers == 16
    assert not done.unmatched
    assert converted(tmp_path, MLX_LM + "optimizer: adamw\n")[0].training.weight_decay == 0.01


def test_the_folder_of_data(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.jsonl").write_text("", "utf-8")
    text = MLX_LM.replace("org/rows", "rows")
    with pytest.raises(ConfigError, match="data: rows: lorasmith cannot read this kind of dataset"):
        converted(tmp_path, text)
    (tmp_path / "rows" / "train.jsonl").write_text("", "utf-8")
    config, _done = converted(tmp_path, text)
    assert (config.data.data, config.data.held_out) == (("rows/train.jsonl",), 0)
    (tmp_path / "rows" / "valid.jsonl").write_text("", "utf-8")
    config, _done = converted(tmp_path, text)
    assert (config.data.held_out, config.training.eval_every) == ("rows/valid.jsonl", 200)


def test_datasets_of_the_hub(tmp_path):
    part = "hf_dataset:\n  path: org/a\n  prompt_feature: ask\n  completion_feature: reply\n  train_split: train[:9%]\n"
    config, done = converted(tmp_path, MLX_LM + part)
    assert (config.data.data, config.data.map) == (("org/a",), {"prompt": "ask", "completion": "reply"})
    assert "hf_dataset.train_split: train[:9%]" in done.unmatched
    config, done = converted(tmp_path, MLX_LM + part.replace("[:9%]", "[:9]") + "  valid_split: train[:5]\n")
    assert (config.data.data, set(done.unmatched)) == (("org/a#9",), {"hf_dataset.valid_split: train[:5]"})


@pytest.mark.parametrize(("line", "blocks"), [("", 16), ("num_layers: -1\n", -1)])
def test_full_fine_tuning(tmp_path, line, blocks):
    text = MLX_LM.replace("fine_tune_type: lora", "fine_tune_type: full") + line
    config, done = converted(tmp_path, text + "lora_parameters:\n  rank: 4\n")
    assert (config.training.method, config.training.learning_rate, config.lora) == ("full", 1e-5, LoraConfig())
    assert done.no_effect == {"options of methods that are switched off": ["lora_parameters.rank"]}
    assert set(done.unmatched) == {f"num_layers: {blocks}"}  # lorasmith trains the other blocks and the embeddings too


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fine_tune_type: other", "lorasmith trains LoRA adapters (and DoRA) or all weights"),
        ("optimizer: sgd", "optimizer: sgd: lorasmith does not have this optimizer"),
        ("resume_adapter_file: old.safetensors", "lorasmith cannot start from this"),
    ],
)
def test_what_changes_the_meaning_is_refused(tmp_path, line, words):
    key = line.partition(":")[0]
    text = "\n".join(old for old in MLX_LM.splitlines() if old.partition(":")[0] != key)
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, f"{text}\nnum_layers: -1\n{line}\n")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ("{name: cosine_decay, warmup: 100, arguments: [1e-5, 200, 1e-7]}", 200),
        ("{name: cosine_decay, warmup: 100, arguments: [1e-5, 600]}", 600),
        ("{name: linear_schedule, arguments: [1e-5, 0.0, 1000]}", 1000),
        ("{name: cosine_decay, arguments: [1e-5, 600, 1e-7]}", None),
        ("{name: linear_schedule, warmup: 100, arguments: [1e-5, 0.0, 500]}", None),
        ("{name: cosine_decay, arguments: [1e-5]}", None),
    ],
)
def test_a_schedule_that_does_not_end_with_the_training_is_told(tmp_path, schedule, told):
    _config, done = converted(tmp_path, f"{MLX_LM}lr_schedule: {schedule}\n")
    assert set(done.unmatched) == (set() if told is None else {f"lr_schedule.arguments: {told}"})
    if told is not None:
        assert f"over {told} steps" in done.unmatched[f"lr_schedule.arguments: {told}"]
        assert "the whole training, 600 steps" in done.unmatched[f"lr_schedule.arguments: {told}"]


def test_dora_and_what_is_told(tmp_path):
    text = MLX_LM.replace("type: lora", "type: dora").replace("org/base", "mlx-community/base-4bit")
    more = "lr_schedule: {name: step_decay, arguments: [1e-4, 0.9, 10]}\nlora_parameters: 3\n"
    config, done = converted(tmp_path, text + more)
    assert config.lora.use_dora
    assert set(done.unmatched) == {
        "model: mlx-community/base-4bit", "lr_schedule: step_decay [0.0001, 0.9, 10]", "lora_parameters: 3",
    }  # fmt: skip


def test_the_table_names_options():
    assert all(map(is_option, SAME.values()))
