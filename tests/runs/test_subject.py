"""What a report is about: finished and unfinished runs, adapters alone, and what is none of these."""

import shutil
from pathlib import Path

import pytest

from lorasmith.errors import AdapterError, RunError
from lorasmith.runs.subject import find_subject
from tests.support.tiny import Crash, crash_at, trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that finished, one that died after step 3 of 4, and one that died before its first checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "done", eval_every=2)
    with pytest.raises(Crash):
        trained(folder / "died", crash_at(3), save_every=2)
    with pytest.raises(Crash):
        trained(folder / "fresh", crash_at(1), save_every=2)
    return folder


def test_a_finished_run(runs):
    found = find_subject(runs / "done")
    assert (found.state, found.adapter, found.step, found.steps) == ("finished", runs / "done" / "adapter", 4, 4)
    assert found.summary is not None
    assert (found.summary.train_examples, found.summary.held_out_examples) == (9, 3)
    assert [step for step, _loss in found.held_out] == [0, 2, 4]
    assert found.epochs == pytest.approx(13 / 9, abs=0.02)
    assert found.saw_all_rows
    assert find_subject(runs / "done" / "adapter") == found


def test_the_adapter_may_be_an_earlier_one_than_the_last(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "done", run)
    summary = (run / "summary.json").read_text("utf-8")
    (run / "summary.json").write_text(summary.replace('"best_step": 4', '"best_step": 2'), "utf-8")
    found = find_subject(run)
    assert (found.step, found.steps, found.later) == (2, 4, (run / "checkpoints" / "step-000004",))
    assert not found.saw_all_rows  # after 8 of 9 examples
    assert find_subject(runs / "done").later == ()
    config = (run / "config.toml").read_text("utf-8")
    (run / "config.toml").write_text(config.replace('bias = "none"', 'bias = "all"'), "utf-8")
    assert find_subject(run).later == ()


def test_an_unfinished_run_is_its_latest_checkpoint(runs):
    found = find_subject(runs / "died")
    assert (found.state, found.step, found.steps) == ("interrupted", 2, 3)
    assert found.adapter == runs / "died" / "checkpoints" / "step-000002"


def test_a_run_without_a_checkpoint_has_no_adapter_yet(runs):
    with pytest.raises(RunError, match="this run has no adapter yet"):
        find_subject(runs / "fresh")


def test_a_run_of_all_weights(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Crash):
        trained(run, crash_at(3), save_every=2, method="full", learning_rate=1e-3)
    with pytest.raises(RunError, match="trains all weights and is not finished"):
        find_subject(run)
    trained(run, resume=True, save_every=2, method="full", learning_rate=1e-3)
    found = find_subject(run)
    assert (found.adapter, found.state, found.step, found.later) == (run / "model", "finished", 4, ())
    assert found.is_whole_model
    assert found == find_subject(run / "model")


def test_an_adapter_without_a_run(runs, tmp_path):
    shutil.copytree(runs / "done" / "adapter", tmp_path / "mine")
    found = find_subject(tmp_path / "mine")
    assert (found.state, found.config, found.step, found.steps, found.training) == ("adapter", None, None, None, [])
    with pytest.raises(AdapterError, match="the adapters are in folders inside it"):
        find_subject(tmp_path)
