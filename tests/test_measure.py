"""`eval` without a file repeats what the training measured, on the very same examples, or refuses."""

import json
import shutil
from pathlib import Path

import pytest

from lorasmith import measure
from lorasmith.data.config import DataConfig
from lorasmith.errors import ConfigError, DataError, RunError
from lorasmith.measure import evaluate_run
from lorasmith.model.config import ModelConfig
from tiny import Watch, rows_file, trained

SHORT = DataConfig(max_length=64, too_long="truncate")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, `run`, and its data, `rows.jsonl`; the seed is not the usual one."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "run", seed=3)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy whose data a test may change: config.toml names it by its path."""
    shutil.copytree(runs, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    text = (run / "config.toml").read_text("utf-8")
    (run / "config.toml").write_text(text.replace(str(runs), str(tmp_path / "copy")), "utf-8")
    return run


def test_eval_right_after_training_gives_the_summarys_numbers(runs):
    summary = json.loads((runs / "run" / "summary.json").read_text("utf-8"))
    found = evaluate_run(runs / "run", model=ModelConfig(dtype="float32"))
    assert found.examples == 3
    assert (found.before, found.after) == pytest.approx((summary["loss_before"], summary["loss_after"]), rel=1e-6)
    assert [found.low, found.high] == pytest.approx(summary["interval"], rel=1e-5)
    assert found.after < found.before


def test_the_seed_of_the_interval_is_the_runs(runs, monkeypatch):
    seeds = []
    right = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *given: seeds.append(given[2]) or right(*given))
    evaluate_run(runs / "run")
    evaluate_run(runs / "run", [rows_file(runs / "other.jsonl", range(20, 24))])
    evaluate_run(runs / "run" / "adapter", [rows_file(runs / "other.jsonl", range(20, 24))])
    assert seeds == [3, 3, 0]


@pytest.mark.parametrize("rows", [range(1, 13), range(13), range(11, -1, -1)], ids=["others", "more", "reordered"])
def test_data_that_changed_since_the_training_is_refused(run, rows):
    file = rows_file(run.parent / "rows.jsonl", rows)
    with pytest.raises(RunError, match="the data changed since the training") as caught:
        evaluate_run(run)
    assert file in str(caught.value)
    assert "lorasmith eval RUN FILE" in str(caught.value)
    assert evaluate_run(run, [file]).examples == len(rows)


def test_data_that_is_gone_is_named(run):
    (run.parent / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        evaluate_run(run)


@pytest.mark.parametrize("text", [None, "{", "\0\xff", "[]", "{}"])
def test_a_run_that_does_not_say_what_it_held_out(run, text):
    path = run / "environment.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match="held out"):
        evaluate_run(run)


def test_files_are_measured_whole_and_nothing_of_a_training_is_said(runs):
    report = Watch()
    assert evaluate_run(runs / "run", [rows_file(runs / "own.jsonl", range(30, 37))], report=report).examples == 7
    assert not any("held out" in text or "to learn from" in text for text in report.said)
    assert report.tasks[-1] == "held-out loss of the adapter"
    with pytest.raises(DataError, match="longer than 64 tokens"):
        evaluate_run(runs / "run", [rows_file(runs / "own.jsonl")], limits=DataConfig(max_length=64))
    report = Watch()
    evaluate_run(runs / "run", [rows_file(runs / "own.jsonl")], limits=SHORT, report=report)
    assert any("cut at 64 tokens" in text for text in report.warned)


def test_limits_without_a_file_are_refused(runs):
    with pytest.raises(ConfigError, match=r"data\.max_length and data\.too_long are for files of your own"):
        evaluate_run(runs / "run", limits=SHORT)


def test_nothing_held_out(tmp_path):
    trained(tmp_path / "run", held_out=0)
    with pytest.raises(DataError, match="nothing was held out in this run"):
        evaluate_run(tmp_path / "run")


def test_an_adapter_folder_names_no_examples(runs):
    with pytest.raises(DataError, match="not a run folder, so it names no held-out examples"):
        evaluate_run(runs / "run" / "adapter")


def test_the_home_folder_is_known(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert evaluate_run("~/run").examples == 3
