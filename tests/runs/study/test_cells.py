"""What is kept of a trained cell."""

import json
import math

import pytest
import torch

from lorasmith.errors import ConfigError, RunError
from lorasmith.evaluation.loss import ExampleLosses
from lorasmith.runs.study import cells
from lorasmith.runs.study.cells import Losses, is_finished, read_measured
from lorasmith.runs.study.run import run_study
from lorasmith.training.evaluator import Evaluator
from lorasmith.training.run_files import SUMMARY, read_summary
from tests.support.studies import small_study
from tests.support.tiny import Watch


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = small_study(tmp_path_factory.mktemp("cells"), '"lora.r" = [1, 2]', more="[study]\nforget = false")
    run_study(study)
    return study


def test_losses_keep_every_bit():
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    before, after = (ExampleLosses(torch.rand(2, dtype=torch.float64), weights) for _ in range(2))
    kept = Losses(**json.loads(json.dumps(vars(Losses.of(before, after)))))
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(kept.pair, (before, after), strict=True))
    assert kept.pair[0].loss == before.loss


def test_the_losses_of_every_example_are_kept(study):
    measured = read_measured(study.folder, "r1")
    assert len(measured.held_out.after) == 12
    assert measured.held_out.pair[1].loss == read_summary(study.folder / "r1").loss_after
    assert measured.general is None, "the file does not ask for it"
    assert measured.base == read_measured(study.folder, "r2").base


def test_a_cell_is_finished_when_it_was_trained_and_measured(study):
    cell = study.cells[0]
    assert is_finished(study.folder, cell)
    summary = study.folder / cell.name / SUMMARY
    text = summary.read_text("utf-8")
    summary.unlink()
    assert not is_finished(study.folder, cell)
    summary.write_text(text, "utf-8")


def test_a_broken_file_is_said(study):
    path = study.folder / "results" / "r2.json"
    text = path.read_text("utf-8")
    path.write_text('{"version": 1, "base": 3}', "utf-8")
    with pytest.raises(RunError, match=r"r2\.json: not in the format that a study writes: .* Remove the file"):
        read_measured(study.folder, "r2")
    path.write_text(text, "utf-8")


def test_the_base_model_is_measured_once_for_the_same_examples(tmp_path, monkeypatch):
    calls, whole = [], Evaluator.base_losses
    monkeypatch.setattr(Evaluator, "base_losses", lambda self: calls.append(self) or whole(self))
    grid = '"lora.r" = [1, 2]\n"data.held_out" = [12, 8]'
    result = run_study(small_study(tmp_path, grid))
    assert len(calls) == 2
    assert len({cell.loss.before for cell in result.cells}) == 2


def test_memory_is_that_of_each_cell(study):
    assert 0 < read_summary(study.folder / "r2").peak_memory_mib < 4000


def test_a_held_out_loss_that_is_not_finite_is_a_training_that_diverged(tmp_path, monkeypatch):
    study = small_study(tmp_path, '"lora.r" = [1]')
    study.folder.mkdir()
    infinite = ExampleLosses(torch.tensor([math.inf]), torch.ones(1))
    monkeypatch.setattr(
        cells, "train", lambda _config, _report, *, measure, **_more: measure.finished(None, infinite, infinite)
    )
    heard = []
    cells.train_cells(
        study.folder,
        study.cells,
        None,
        cells.BaseModel(False),
        lambda cell: None,
        lambda cell, problems: heard.append(problems),
    )
    assert read_measured(study.folder, "r1").problems == heard[0]
    assert "the held-out loss is not finite; the training diverged." in heard[0][0]


def test_cells_that_share_a_base_are_trained_at_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    grid = '"lora.r" = [1, 2]\n"training.learning_rate" = [1e-3, 1e-2, 1e30]'
    alone, together = (small_study(tmp_path / name, grid) for name in "ab")
    watch = Watch()
    one, other = run_study(alone), run_study(together, watch, at_once=3)
    assert [cell.state for cell in other.cells] == [cell.state for cell in one.cells]
    assert [cell.state for cell in one.cells] == ["finished", "finished", "failed"] * 2
    for a, b in zip(one.cells, other.cells, strict=True):
        if a.loss:
            assert b.loss.before == a.loss.before
            assert b.loss.after == pytest.approx(a.loss.after, rel=1e-5)
            assert b.general.after == pytest.approx(a.general.after, rel=1e-5)
            assert (b.seconds, b.peak_memory_mib) == (None, None), "which are those of all three"
            assert list((together.folder / b.name / "checkpoints").glob("step-*")) == []
    assert [text.partition(": ")[0] for text in watch.said] == [
        "[1/6] r1_lr0.001", "[2/6] r1_lr0.01", "[4/6] r2_lr0.001", "[5/6] r2_lr0.01",
    ]  # fmt: skip
    assert run_study(together, at_once=3) == other


def test_what_cannot_share_a_base_is_trained_alone(tmp_path):
    methods = small_study(tmp_path, '"training.method" = ["lora", "full"]\n"training.seed" = [0, 1, 2, 3]').cells
    assert [len(group) for group in cells.grouped(methods, 3)] == [3, 1, 1, 1, 1, 1]
    dropout = small_study(tmp_path, '"lora.lora_dropout" = [0.0, 0.1]\n"lora.r" = [1, 2]').cells
    assert [len(group) for group in cells.grouped(dropout, 4)] == [2, 1, 1]


def test_runs_that_fail_together_are_trained_alone(tmp_path, monkeypatch):
    def fail(_self, _resume, _overwrite):
        raise RunError("no room for two")

    monkeypatch.setattr(cells.Group, "train", fail)
    watch = Watch()
    result = run_study(small_study(tmp_path, '"lora.r" = [1, 2]'), watch, at_once=2)
    assert [cell.state for cell in result.cells] == ["finished"] * 2
    assert all(cell.seconds for cell in result.cells)
    assert watch.warned == ["[1/2] r1: these runs are trained one after the other: no room for two"]


def test_processes_and_adapters_at_once_are_not_combined(tmp_path):
    with pytest.raises(ConfigError, match="--parallel and --at-once cannot be combined"):
        run_study(small_study(tmp_path, '"lora.r" = [1]'), parallel=2, at_once=2)
