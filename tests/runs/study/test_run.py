"""A whole study on a tiny model: its results, what an interruption keeps, and runs that diverge."""

import json
from dataclasses import replace

import pytest

from lorasmith.errors import DataError, Interrupted, LorasmithError
from lorasmith.runs.study.cells import read_measured
from lorasmith.runs.study.folder import RESULT
from lorasmith.runs.study.run import run_study
from lorasmith.runs.train import train
from lorasmith.training.run_files import SUMMARY, read_summary
from tests.support.studies import small_study
from tests.support.tiny import Watch, adapter_bytes, metrics


class Stop(Watch):
    """Stops the study with Ctrl-C in the step `step` of the run number `run`."""

    def __init__(self, run: int, step: int) -> None:
        super().__init__()
        self.run, self.step = run, step

    def progress(self, task, done, total, **numbers):
        super().progress(task, done, total, **numbers)
        if task.startswith(f"[{self.run}/") and done == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    watch, shown = Watch(), []
    study = small_study(folder)
    return study, run_study(study, watch, shown.append), watch, shown


def test_every_cell_is_an_ordinary_run_that_equals_one_alone(finished, tmp_path):
    study, _result, _watch, _shown = finished
    for cell in (study.cells[0], study.cells[-1]):
        alone = tmp_path / cell.name
        train(cell.config.model_copy(update={"output": str(alone)}))
        assert metrics(study.folder / cell.name) == metrics(alone)
        assert adapter_bytes(study.folder / cell.name) == adapter_bytes(alone)


def test_the_result_has_every_run_and_compares_settings_over_seeds(finished):
    study, result, watch, shown = finished
    assert [cell.state for cell in result.cells] == ["finished"] * 8
    assert result.axis == "training.learning_rate"
    assert result.examples == 12
    assert [setting.name for setting in result.settings] == [
        "r 1, lr 0.001", "r 1, lr 0.01", "r 4, lr 0.001", "r 4, lr 0.01",
    ]  # fmt: skip
    for cell in result.cells:
        summary = read_summary(study.folder / cell.name)
        assert cell.loss.after == summary.loss_after
        assert cell.general.examples == 48
    assert result.best.mean == min(setting.mean for setting in result.settings)
    assert [setting.from_best is None for setting in result.settings].count(True) == 1
    written = json.loads((study.folder / RESULT).read_text("utf-8"))
    assert written == json.loads(json.dumps(result.to_json()))
    assert len(shown) == 9, "after each run, and at the end"
    assert sum(": 3 steps, held-out loss" in text for text in watch.said) == 8
    assert watch.tasks[0] == "[1/8] r1_lr0.001_seed0"


def test_a_finished_study_trains_nothing(finished):
    study, result, _watch, _shown = finished
    watch = Watch()
    assert run_study(study, watch) == result
    assert watch.tasks == []
    assert watch.said == [f"{study.folder}: 8 of 8 runs are finished and kept."]


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, finished):
    study = small_study(tmp_path)
    with pytest.raises(Interrupted, match=r"2 of 8 runs are finished and kept .*the same command continues"):
        run_study(study, Stop(3, 2))
    assert not (study.folder / study.cells[2].name / SUMMARY).exists()
    first = (study.folder / study.cells[0].name / SUMMARY).stat().st_mtime_ns
    watch = Watch()
    result = run_study(study, watch)
    assert (study.folder / study.cells[0].name / SUMMARY).stat().st_mtime_ns == first
    assert watch.tasks[0].startswith("[3/8]")
    assert [cell.loss for cell in result.cells] == [cell.loss for cell in finished[1].cells]
    assert [cell.general for cell in result.cells] == [cell.general for cell in finished[1].cells]


def test_what_was_not_measured_is_measured_again(tmp_path):
    study = small_study(tmp_path, '"lora.r" = [1]')
    before = run_study(study)
    (study.folder / "results" / "r1.json").unlink()
    after = run_study(study)
    assert after.cells[0].loss == before.cells[0].loss
    assert read_measured(study.folder, "r1") is not None


def test_a_run_that_diverges_is_shown_and_the_others_go_on(tmp_path):
    study = small_study(tmp_path, '"training.learning_rate" = [1e30, 1e-3]')
    watch = Watch()
    result = run_study(study, watch)
    assert [cell.state for cell in result.cells] == ["failed", "finished"]
    assert "not finite" in result.cells[0].problems[0]
    assert "[1/2] lr1e+30 failed: step 2: loss nan" in watch.warned[-1]
    assert result.best.options == {"training.learning_rate": 1e-3}
    watch = Watch()
    run_study(study, watch)
    assert watch.tasks == []
    assert watch.warned[0].startswith("lr1e+30: failed before and is not tried again.")


def test_a_problem_of_all_runs_ends_the_study(tmp_path):
    study = small_study(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        run_study(study)


def test_a_problem_of_one_run_does_not_end_it(tmp_path):
    study = small_study(tmp_path, '"lora.target_modules" = ["all-linear", "no_such_module"]')
    watch = Watch()
    result = run_study(study, watch)
    assert [cell.state for cell in result.cells] == ["finished", "open"]
    assert "no_such_module failed:" in watch.warned[-1]


def test_two_studies_in_one_folder_at_once_are_refused(tmp_path):
    study, caught = small_study(tmp_path, '"lora.r" = [1]'), []

    class Second(Watch):
        def progress(self, task, done, total, **numbers):
            if not caught:
                with pytest.raises(LorasmithError) as error:
                    run_study(study)
                caught.append(str(error.value))

    run_study(study, Second())
    assert "is in use" in caught[0] or "already" in caught[0]


def test_data_sizes_are_compared_on_the_same_rows(tmp_path):
    study = small_study(tmp_path, '"data.train_rows" = [8, 0.5]\n"training.seed" = [0, 1]')
    result = run_study(study)
    assert result.axis == "data.train_rows"
    assert len({cell.loss.before for cell in result.cells}) == 1
    assert result.examples == 12


def test_full_fine_tuning_is_compared_with_lora_and_changes_no_other_run(tmp_path):
    grid = '"training.method" = ["lora", "full", "lora"]\n"training.seed" = [0, 1]'
    study = small_study(tmp_path, grid, training="learning_rate = 1e-2")
    result = run_study(study)
    assert [cell.name for cell in result.cells] == ["lora_seed0", "lora_seed1", "full_seed0", "full_seed1"]
    assert len({round(cell.loss.before, 6) for cell in result.cells}) == 1, "with other kernels, but the same model"
    assert len({cell.general.before for cell in result.cells}) == 1
    assert all(cell.general.difference != 0 for cell in result.cells)
    for cell in study.cells:
        alone = tmp_path / cell.name
        train(cell.config.model_copy(update={"output": str(alone)}))
        assert metrics(study.folder / cell.name) == metrics(alone)
        assert list((study.folder / cell.name / "checkpoints").glob("step-*")) == []


def test_a_study_of_full_fine_tuning_goes_on_where_it_was(tmp_path):
    study = small_study(tmp_path, '"training.method" = ["full"]', training="save_every = 1\nlearning_rate = 1e-2")
    with pytest.raises(Interrupted):
        run_study(study, Stop(1, 2))
    (cell,) = run_study(study).cells
    (whole,) = run_study(replace_folder(study, tmp_path / "whole")).cells
    assert (cell.loss, cell.general) == (whole.loss, whole.general)


def replace_folder(study, folder):
    cells = (
        replace(cell, config=cell.config.model_copy(update={"output": str(folder / cell.name)})) for cell in study.cells
    )
    return replace(study, folder=folder, cells=tuple(cells))


def test_generated_answers_are_scored_if_the_file_asks_for_it(tmp_path):
    study = small_study(tmp_path, '"lora.r" = [1]', training="generate = 3\nmax_new_tokens = 4")
    (cell,) = run_study(study).cells
    assert {"exact", "f1"} <= cell.scores.keys() == cell.score_intervals.keys()
    for name, (before, after) in cell.scores.items():
        low, high = cell.score_intervals[name]
        assert low - 1e-9 <= after - before <= high + 1e-9
