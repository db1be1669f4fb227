"""From a configuration to a job: the problems of all parts come together, and its origin is complete."""

import json
from pathlib import Path

import pytest

from lorasmith.config.toml import Config, load_config
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.report import Report
from lorasmith.training import assemble as assembling
from lorasmith.training.assemble import NO_EFFECT_ON_ADAPTER, Assembled, assemble, together
from lorasmith.training.distributed import World
from tests.support.tiny import model_folder, rows_file


def configured(folder: Path, **training: object) -> Config:
    sections = {
        "model": {"model": str(model_folder()), "dtype": "float32", "device": "cpu"},
        "data": {"data": (rows_file(folder / "rows.jsonl"),), "held_out": 3.0},
        "training": {"batch_size": 4, "max_steps": 4} | training,
    }
    return load_config(None, sections)


def assembled(folder: Path, **training: object) -> Assembled:
    return assemble(configured(folder, **training), folder / "run", Report(), World())


def refuse(*problems: str) -> None:
    raise ConfigError(*problems)


def test_results_come_in_order():
    assert together(lambda: 1, lambda: "two") == [1, "two"]


def test_a_single_error_stays_what_it_is():
    with pytest.raises(ConfigError) as caught:
        together(lambda: 1, lambda: refuse("a", "b"))
    assert caught.value.problems == ("a", "b")


def test_the_problems_of_all_parts_come_together():
    with pytest.raises(LorasmithError) as caught:
        together(lambda: refuse("a", "b"), lambda: 1, lambda: refuse("c"))
    assert caught.value.problems == ("a", "b", "c")


def test_a_job_is_ready_and_nothing_is_written(tmp_path):
    made = assembled(tmp_path)
    assert len(made.job.plan) == 4
    assert (len(made.data.train), len(made.job.held_out)) == (9, 3)
    assert made.job.parameters.values.requires_grad
    assert not (tmp_path / "run").exists()


def test_the_origin_holds_every_option_that_affects_the_adapter(tmp_path):
    job = assembled(tmp_path, log_every=3).job
    config = configured(tmp_path)
    wanted = {f"lora.{key}" for key in config.lora.model_dump()}
    wanted |= {f"training.{key}" for key in config.training.model_dump() if key not in NO_EFFECT_ON_ADAPTER}
    wanted |= {f"preference.{key}" for key in config.preference.model_dump()}
    assert job.origin.options.keys() == wanted
    assert json.loads(job.origin.options["training.batch_size"]) == 4
    assert {"base_config", "dtype", "train_sha256", "processes"} <= job.origin.settings.keys()


def test_more_steps_than_a_run_can_have_are_refused(tmp_path):
    config = configured(tmp_path, max_steps=None, epochs=900_000, batch_size=1)
    with pytest.raises(
        ConfigError, match=r"training\.epochs: 900000 epochs are [\d,]+ steps, but a run can have at most 999,999"
    ):
        assemble(config, tmp_path / "run", Report(), World())


@pytest.mark.parametrize(
    ("size", "method", "rate"),
    [(499_000_000, "lora", 1e-3), (500_000_000, "lora", 2e-4), (499_000_000, "full", 1e-4), (10**10, "full", 2e-5)],
)
def test_the_default_learning_rate_is_that_for_the_size_of_the_base(tmp_path, monkeypatch, size, method, rate):
    monkeypatch.setattr(assembling, "count_parameters", lambda _model: size)
    made = assembled(tmp_path, method=method)
    assert made.job.config.learning_rate == made.config.training.learning_rate == pytest.approx(rate)
    assert json.loads(made.job.origin.options["training.learning_rate"]) == pytest.approx(rate)
    assert assembled(tmp_path, method=method, learning_rate=3e-4).job.config.learning_rate == 3e-4
