"""The time of the runs of a study, from a few steps of one run of each kind."""

from lorasmith.runs.study import forecast as module
from lorasmith.runs.study.forecast import forecast
from lorasmith.runs.study.run import run_study
from tests.support.studies import small_study


def test_one_run_of_each_kind_is_tried(tmp_path, monkeypatch):
    tried, check = [], module.check
    monkeypatch.setattr(module, "check", lambda config, *rest: tried.append(config) or check(config, *rest))
    study = small_study(tmp_path)
    expected = forecast(study)
    assert [config.lora.r for config in tried] == [1, 4]
    assert len(expected) == 8
    assert all(one.seconds > 0 and not one.is_finished for one in expected)
    assert len({one.seconds for one in expected[:4]}) == 1
    assert not study.folder.exists()


def test_finished_runs_are_marked(tmp_path):
    run_study(small_study(tmp_path, '"lora.r" = [1]'))
    more = small_study(tmp_path, '"lora.r" = [1, 2]')
    assert [one.is_finished for one in forecast(more)] == [True, False]


def test_problems_are_said_of_the_run_that_has_them(tmp_path):
    study = small_study(tmp_path, '"lora.target_modules" = ["all-linear", "no_such_module"]')
    good, bad = forecast(study)
    assert good.problems == ()
    assert bad.seconds is None
    assert "no_such_module" in bad.problems[0]
