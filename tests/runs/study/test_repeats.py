"""A study that repeats only the best runs with other seeds."""

import pytest

from lorasmith.config.study import load_study
from lorasmith.errors import ConfigError, Interrupted
from lorasmith.runs.study.forecast import forecast
from lorasmith.runs.study.repeats import runs_of
from lorasmith.runs.study.result import StudyResult
from lorasmith.runs.study.run import run_study
from tests.runs.study.test_run import Stop
from tests.support.studies import small_study, study_file
from tests.support.tiny import Watch

GRID = '"lora.r" = [1, 4]\n"training.learning_rate" = [1e-3, 1e-2, 1e30]\n"training.seed" = [7, 0, 1]'
BEST = '[study]\nrepeat = "best"\n'


def test_the_best_rate_of_each_curve_is_repeated(tmp_path):
    study, watch = small_study(tmp_path, GRID, more=BEST), Watch()
    assert len(study.cells) == 18
    assert (len(runs_of(study).cells), runs_of(study).total) == (6, 10)
    result = run_study(study, watch)
    names = [cell.name for cell in result.cells]
    assert len(names) == 10
    for curve in result.curves:
        first = {cell.options["training.learning_rate"]: cell for s in curve.settings for cell in s.cells[:1]}
        assert [cell.seed for cell in first.values()] == [7, 7, 7]
        losses = {rate: cell.loss.after for rate, cell in first.items() if cell.loss}
        best = min(losses, key=losses.__getitem__)
        repeated = [setting for setting in curve.settings if len(setting.cells) == 3]
        assert [setting.options["training.learning_rate"] for setting in repeated] == [best]
        assert curve.best == repeated[0]
        assert [cell.seed for cell in curve.best.cells] == [7, 0, 1]
    assert result.best in [curve.best for curve in result.curves]
    assert watch.tasks[0].startswith("[1/10] ")
    assert StudyResult.from_json(result.to_json()) == result
    assert run_study(study) == result
    assert len(forecast(study)) == 10


def test_an_interrupted_one_goes_on_with_the_same_choice(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run_study(small_study(tmp_path / "a", GRID, more=BEST))
    study = small_study(tmp_path / "b", GRID, more=BEST)
    for run, kept in ((2, 1), (8, 7)):
        with pytest.raises(Interrupted, match=f"^Interrupted. {kept} of 10 runs are finished"):
            run_study(study, Stop(run, 2))
    parts = run_study(study)
    assert [cell.name for cell in parts.cells] == [cell.name for cell in whole.cells]
    assert [cell.loss for cell in parts.cells] == [cell.loss for cell in whole.cells]


def test_where_every_run_failed_nothing_is_repeated(tmp_path):
    grid = '"training.learning_rate" = [1e29, 1e30]\n"training.seed" = [0, 1]'
    result = run_study(small_study(tmp_path, grid, more=BEST))
    assert [cell.state for cell in result.cells] == ["failed", "failed"]


def test_without_held_out_examples_it_is_refused(tmp_path):
    file = study_file(tmp_path, GRID, more=BEST)
    file.write_text(file.read_text("utf-8").replace("held_out = 12", "held_out = 0"), "utf-8")
    with pytest.raises(ConfigError, match=r"study.repeat: the best run is found by held-out examples"):
        load_study(file)
