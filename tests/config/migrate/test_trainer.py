"""Keys of transformers' Trainer: what its values mean there."""

import pytest

from lorasmith.config.migrate.trainer import SAME
from lorasmith.errors import ConfigError
from tests.support.migrating import AXOLOTL, LLAMA_FACTORY, MS_SWIFT, converted, described, is_option


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    described(tmp_path)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1", ("constant", 0.0)),  # which has no warmup there
        ("lr_scheduler_type: constant_with_warmup\nwarmup_ratio: 0.1", ("constant", 0.1)),
        ("warmup_steps: 20\nwarmup_ratio: 0.1", ("linear", 20)),  # the steps count
        ("warmup_steps: 0\nwarmup_ratio: 0.1", ("linear", 0.1)),
        ("lr_scheduler_type: cosine", ("cosine", 0.0)),
        ("lr_scheduler_type: polynomial", ("linear", 0.0)),
    ],
)
def test_schedule_and_warmup(tmp_path, lines, expected):
    config, done = converted(tmp_path, f"{LLAMA_FACTORY}{lines}\n")
    assert (config.training.schedule, config.training.warmup) == expected
    told = {"lr_scheduler_type: polynomial"} if "polynomial" in lines else set()
    assert set(done.unmatched) == told | ({"warmup_ratio: 0.1"} if "type: constant\n" in lines else set())


@pytest.mark.parametrize(("more", "lowest"), [("min_lr: 1e-6", 1e-6), ("min_lr_rate: 0.1", 1e-5)])
def test_the_lowest_learning_rate(tmp_path, more, lowest):
    lines = f"learning_rate: 1e-4\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {{{more}}}\n"
    assert converted(tmp_path, LLAMA_FACTORY + lines)[0].training.min_learning_rate == pytest.approx(lowest)
    _config, done = converted(tmp_path, LLAMA_FACTORY + "lr_scheduler_kwargs: {power: 2}\n")
    assert set(done.unmatched) == {"lr_scheduler_kwargs: {power}"}


@pytest.mark.parametrize(
    ("lines", "evaluate", "save"),
    [
        ("eval_strategy: 'no'\neval_steps: 9", 0, 500),
        ("eval_strategy: no\neval_steps: 9", 0, 500),  # false for YAML
        ("eval_steps: 9", 0, 500),
        ("evaluation_strategy: steps\neval_steps: 9", 9, 500),
        ("eval_strategy: steps\nlogging_steps: 7", 7, 500),  # the Trainer then evaluates as often as it logs
        ("eval_strategy: steps\neval_steps: 0.1", 0, 500),
        ("save_strategy: epoch\nsave_steps: 9", 0, "epoch"),
        ("save_strategy: 'no'", 0, 0),
        ("save_steps: 30.0", 0, 30),
    ],
)
def test_evaluations_and_checkpoints(tmp_path, lines, evaluate, save):
    config, done = converted(tmp_path, f"{LLAMA_FACTORY}{lines}\n")
    assert (config.training.eval_every, config.training.save_every) == (evaluate, save)
    assert set(done.unmatched) == ({"eval_steps: 0.1"} if "0.1" in lines else set())


def test_once_per_epoch(tmp_path):
    config, _done = converted(tmp_path, LLAMA_FACTORY + "eval_strategy: epoch\nval_size: 0.1\n")
    assert config.training.eval_every == "epoch"


@pytest.mark.parametrize("line", ["eval_strategy: sometimes", "save_strategy: best", "resume_from_checkpoint: old"])
def test_values_without_a_counterpart_are_told(tmp_path, line):
    _config, done = converted(tmp_path, f"{LLAMA_FACTORY}{line}\n")
    assert set(done.unmatched) == {line}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_8bit"])
def test_adamw_by_any_of_its_names(tmp_path, name):
    _config, done = converted(tmp_path, f"{LLAMA_FACTORY}optim: {name}\n")
    assert not done.unmatched


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Set the key to adamw_torch and choose a learning rate for AdamW"):
        converted(tmp_path, f"{LLAMA_FACTORY}optim: sgd\n")


def test_patience_counts_evaluations(tmp_path):
    lines = "eval_strategy: steps\neval_steps: 5\nval_size: 9\nearly_stopping_steps: 2\n"
    assert converted(tmp_path, LLAMA_FACTORY + lines)[0].training.patience == 2
    assert "early_stopping_steps: 2" in converted(tmp_path, LLAMA_FACTORY + "early_stopping_steps: 2\n")[1].unmatched


def test_services_that_a_training_reports_to(tmp_path):
    config, done = converted(tmp_path, LLAMA_FACTORY + "report_to: tensorboard,wandb,comet_ml\n")
    assert (config.training.tensorboard, config.training.report_to) == (True, ("wandb",))
    assert set(done.unmatched) == {"report_to: comet_ml"}
    assert not converted(tmp_path, LLAMA_FACTORY + "report_to: none\n")[1].unmatched


@pytest.mark.parametrize(
    ("lines", "sent", "told"),
    [
        ("report_to: swanlab\nswanlab_mode: cloud", ("swanlab",), set()),
        ("report_to: swanlab,wandb\nswanlab_mode: local", ("wandb",), {"swanlab_mode: local"}),
        ("report_to: swanlab\nswanlab_mode: disabled", (), set()),
        ("use_swanlab: true\nreport_to: swanlab\nswanlab_project: x\nswanlab_api_key: abc", ("swanlab",),
         {"swanlab_project: x", "swanlab_api_key: ..."}),
        ("use_swanlab: false\nswanlab_project: x", (), set()),
    ],
)  # fmt: skip
def test_what_stays_on_the_machine_is_not_sent(tmp_path, lines, sent, told):
    config, done = converted(tmp_path, f"{LLAMA_FACTORY}{lines}\n")
    assert (config.training.report_to, set(done.unmatched)) == (sent, told)
    if "local" in lines:
        assert "SWANLAB_MODE=local" in done.unmatched["swanlab_mode: local"]


def test_the_table_names_options():
    assert all(map(is_option, SAME.values()))


@pytest.mark.parametrize(
    ("theirs", "left"),
    [
        (AXOLOTL + "tokens: [<a>, <b>]", set()),
        (AXOLOTL + "tokens: [<a>]\nspecial_tokens: {additional_special_tokens: [<b>, <a>]}", set()),
        (LLAMA_FACTORY + "add_tokens: <a>\nadd_special_tokens: <b>\nresize_vocab: true", set()),
        (LLAMA_FACTORY + "add_special_tokens: <a>,<b>", set()),
        (MS_SWIFT + "new_special_tokens: [<a>, <b>, mine.txt]", {"new_special_tokens: mine.txt"}),
    ],
)
def test_tokens_that_are_added(tmp_path, theirs, left):
    config, done = converted(tmp_path, theirs + "\n")
    assert config.data.add_tokens == ("<a>", "<b>")
    assert {key for key in done.unmatched if "token" in key} == left
