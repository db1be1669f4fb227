"""Several adapters trained at once: each is that of its run alone, and lies in a run folder like any other."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from lorasmith.config.toml import Config, load_config
from lorasmith.config.training import TrainingConfig
from lorasmith.errors import Interrupted, LorasmithError, RunError, TrainingError
from lorasmith.runs.together import train_all, train_each
from lorasmith.runs.train import train
from lorasmith.training.run_files import GROUP_CONFIG, read_summary
from tests.support.tiny import Watch, assert_same_results, losses, model_folder, rows_file

# three adapters that differ in everything that may differ
OPTIONS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "seed": 1, "rows": range(12), "max_steps": 5},
    {"r": 2, "lora_alpha": 8, "learning_rate": 3e-2, "seed": 2, "rows": range(4, 20), "max_steps": 3, "clip": 0.1},
    {"r": 8, "lora_alpha": 4, "learning_rate": 1e-3, "last_layers": 1, "rows": range(9), "eval_every": 2},
)


def config(folder: Path, name: str, family: str = "llama", **changes: Any) -> Config:
    """The configuration of a short run in the folder `name`."""
    options = {"held_out": 3, "batch_size": 4, "max_steps": 4, "warmup": 0} | changes
    files = rows_file(folder / f"{name}.jsonl", options.pop("rows", range(12)))
    training = {key: options.pop(key) for key in list(options) if key in TrainingConfig.model_fields}
    model = {"model": str(model_folder(family)), "dtype": options.pop("dtype", "float64")}
    data = {"data": (files,), "held_out": options.pop("held_out")}
    sections = {"model": model, "data": data, "training": training, "lora": options}
    return load_config(None, sections | {"output": str(folder / name)})


def in_folder(folder: Path, one: Config) -> Config:
    """The same run in another folder."""
    return one.model_copy(update={"output": str(folder / Path(one.output or "").name)})


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("row_tokens", [2048, 60])
def test_adapters_trained_at_once_are_those_trained_alone(tmp_path, family, row_tokens):
    configs = [config(tmp_path, f"n{i}", family, row_tokens=row_tokens, **options) for i, options in enumerate(OPTIONS)]
    watch = Watch()
    found = train_all(configs, watch)
    assert "Training 3 adapters at once" in watch.said
    for i, one in enumerate(configs):
        alone = train(in_folder(tmp_path / "alone", one))
        assert_same_results(tmp_path / f"n{i}", tmp_path / "alone" / f"n{i}")
        assert found[i].steps == alone.steps
        assert found[i].loss_after == pytest.approx(alone.loss_after, rel=1e-10)


def test_one_that_fails_lets_the_others_go_on(tmp_path):
    """The second adapter's loss overflows in its second step; it is saved, reported, and in nobody's way."""
    bad = {"learning_rate": 1e30, "schedule": "constant", "weight_decay": 0.1, "dtype": "float32", "held_out": 0}
    good = [config(tmp_path, f"good{i}", dtype="float32", held_out=0, seed=i) for i in range(2)]
    watch = Watch()
    with pytest.raises(TrainingError, match=r"^bad: step 2: loss nan"):
        train_all([good[0], config(tmp_path, "bad", **bad), good[1]], watch)
    assert any(text.startswith("bad: step 2: loss nan") for text in watch.warned)
    assert read_summary(tmp_path / "bad") is None
    assert (tmp_path / "bad" / "checkpoints" / "step-000001").is_dir()
    for i, one in enumerate(good):
        train(in_folder(tmp_path / "alone", one))
        found, wanted = losses(tmp_path / f"good{i}"), losses(tmp_path / "alone" / f"good{i}")
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.usefixtures("exact")
def test_ctrl_c_saves_all_and_resume_continues_all(tmp_path):
    configs = [config(tmp_path, f"n{i}", seed=i, max_steps=3 + i) for i in range(3)]

    class CtrlC(Watch):
        def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
            if (task, done) == ("n1: training", 2):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as stopped:
        train_all(configs, CtrlC())
    assert all(str(tmp_path / f"n{i}" / "checkpoints") in str(stopped.value) for i in range(3))
    assert [read_summary(tmp_path / f"n{i}") for i in range(3)] == [None] * 3
    found = train_all(configs, resume=True)
    assert [one.steps for one in found] == [3, 4, 5]
    train_all([in_folder(tmp_path / "whole", one) for one in configs])
    for i in range(3):
        assert_same_results(tmp_path / f"n{i}", tmp_path / "whole" / f"n{i}")
    watch = Watch()
    assert train_all(configs, watch, resume=True) == found
    assert sum("has already finished" in text for text in watch.said) == 3


@pytest.mark.usefixtures("exact")
def test_dropout_is_trained_one_after_the_other(tmp_path):
    """Each then draws the random numbers of its run alone."""
    configs = [config(tmp_path, f"n{i}", seed=i, lora_dropout=0.2) for i in range(2)]
    watch = Watch()
    train_all(configs, watch)
    (warned,) = [text for text in watch.warned if "one after the other" in text]
    assert "lora.lora_dropout draws other random numbers" in warned
    for i, one in enumerate(configs):
        train(in_folder(tmp_path / "alone", one))
        assert_same_results(tmp_path / f"n{i}", tmp_path / "alone" / f"n{i}")


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"bias": "all"}, "lora.bias trains biases"), ({"modules_to_save": ("lm_head",)}, "lora.modules_to_save trains")],
)
def test_adapters_that_change_the_base_are_trained_separately(tmp_path, changes, why):
    watch = Watch()
    found = train_all([config(tmp_path, "a"), config(tmp_path, "b", **changes), config(tmp_path, "c")], watch)
    assert [Path(one.run).name for one in found] == ["a", "b", "c"]
    assert any(text.startswith(f"b: trained separately: {why}") for text in watch.said)
    assert "Training 2 adapters at once" in watch.said


def test_problems_of_all_data_are_reported_before_anything_is_written(tmp_path):
    configs = [config(tmp_path, name) for name in ("a", "b", "c")]
    for name in ("b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"neither": 1}\n')
    with pytest.raises(LorasmithError) as refused:
        train_all(configs)
    assert {"b:", "c:"} <= {str(problem).split()[0] for problem in refused.value.problems}
    assert not (tmp_path / "a" / "config.toml").exists()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_modules": ("q_proj",)}]
)
def test_variants_at_once(tmp_path, changes):
    configs = [config(tmp_path, "a", max_steps=2), config(tmp_path, "b", max_steps=2, **changes)]
    watch = Watch()
    train_all(configs, watch)
    assert "Training 2 adapters at once" in watch.said
    train(in_folder(tmp_path / "alone", configs[1]))
    assert_same_results(tmp_path / "b", tmp_path / "alone" / "b")


def test_fifty_steps_in_float32(tmp_path):
    configs = [config(tmp_path, f"n{i}", dtype="float32", seed=i, max_steps=50, learning_rate=1e-3) for i in range(2)]
    train_all(configs)
    for i, one in enumerate(configs):
        train(in_folder(tmp_path / "alone", one))
        assert losses(tmp_path / f"n{i}") == pytest.approx(losses(tmp_path / "alone" / f"n{i}"), rel=1e-6)


def test_a_group_without_runs_cannot_be_resumed(tmp_path):
    one = config(tmp_path, "group").model_copy(update={"output": str(tmp_path / "nothing")})
    named = one.data.model_copy(update={"data": (f"a={one.data.data[0]}",)})
    with pytest.raises(RunError, match="there is no run of any of these adapters to resume"):
        train_each(one.model_copy(update={"data": named}), resume=True)


def test_a_group_goes_on_with_the_learning_rate_that_fits_the_base_model(tmp_path):
    """None is given: what was started goes on with what was chosen, and what was not gets the same."""
    file = rows_file(tmp_path / "rows.jsonl")
    data = {"data": {"data": [f"a={file}", f"b={file}"], "held_out": 3.0}}
    sections = {"model": {"model": str(model_folder()), "dtype": "float32"}, "training": {"max_steps": 2}, **data}
    given = load_config(None, {**sections, "output": str(tmp_path / "out")})
    train_each(given)
    shutil.rmtree(tmp_path / "out" / "b")
    (tmp_path / "out" / "a" / "summary.json").unlink()
    train_each(load_config(tmp_path / "out" / GROUP_CONFIG, {}), resume=True)
    rates = [load_config(tmp_path / "out" / name / "config.toml", {}).training.learning_rate for name in "ab"]
    assert rates == [1e-3, 1e-3]
