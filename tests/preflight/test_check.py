"""The result of a check: measured once, with the problems of all parts, and an exit code."""

import pytest

from lorasmith.preflight import check as check_module
from lorasmith.preflight.check import CheckResult, check
from tests.support.checks import config
from tests.support.tiny import rows_file


@pytest.fixture
def files(tmp_path):
    return rows_file(tmp_path / "rows.jsonl")


def test_a_dry_step_only_where_nothing_was_measured(tmp_path, files, monkeypatch):
    assert check(config(files)).facts.expected.by == "dry step"
    monkeypatch.setattr(check_module, "dry_run", lambda *_args: pytest.fail("measured again"))
    again = check(config(files, learning_rate=1e-3))
    assert again.facts.expected.by == "dry step"
    for change in ({"batch_size": 3}, {"target_modules": ["q_proj"]}, {"held_out": 2}):
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            check(config(files, **change))


def test_a_check_that_finds_nothing_has_the_plan_and_the_rows(files):
    result = check(config(files))
    assert (result.problems, result.exit_code) == ([], 0)
    assert result.facts.steps == 4
    assert result.stop_tokens == ("<eos>", "<|im_end|>")
    assert sum(bar.rows for bar in result.lengths) == result.facts.examples == 9
    assert any("9 rows to train on, 3 held out" in text for text in result.notes)
    assert result.to_json()["facts"]["expected"]["by"] == "dry step"


def test_a_loss_that_is_not_finite_is_a_problem_and_is_not_kept(files, monkeypatch):
    monkeypatch.setattr(check_module, "dry_run", lambda *_args: None)
    monkeypatch.setattr(check_module, "save_measurement", lambda *_args: pytest.fail("kept"))
    result = check(config(files))
    assert result.exit_code == 2
    (problem,) = result.problems
    assert "the loss of the first steps is not finite" in problem


def test_an_output_that_is_taken_is_a_problem_beside_the_others(files, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("", "utf-8")
    alone = check(config(files, output=str(tmp_path / "used"))).problems
    assert len(alone) == 1
    together = check(config(files, output=str(tmp_path / "used"), model=str(tmp_path / "no-model"))).problems
    assert alone[0] in together
    assert any("no-model" in problem for problem in together)


def test_warnings_alone_do_not_fail():
    assert CheckResult([], warnings=["slow"]).exit_code == 0
    assert CheckResult(["wrong"]).exit_code == 2
