"""`study` as it is typed."""

import json

from lorasmith.cli.main import main
from tests.support.commands import as_json, refused
from tests.support.studies import study_file


def test_a_study_shows_a_table_and_what_it_found(capsys, tmp_path):
    file = study_file(tmp_path, '"lora.r" = [1]\n"training.learning_rate" = [1e-3, 1e-2]')
    assert main(["study", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:6] == ["setting", "loss", "difference", "95%", "CI", "forgetting"] for line in lines)
    assert any(line.startswith("r 1, lr 0.001 ") for line in lines)
    assert all(len(line) <= 80 for line in lines if line.startswith("r 1, lr") and "  " in line)
    assert any(line.startswith("The lowest held-out loss has r 1, lr 0.01") for line in lines)
    assert lines[-1] == f"Wrote {tmp_path / 'out' / 'study.html'}"
    assert (tmp_path / "out" / "study.html").read_text("utf-8").startswith("<!doctype html>")


def test_a_dry_run_shows_the_runs_and_trains_nothing(capsys, tmp_path):
    file = study_file(tmp_path, '"lora.r" = [1, 2]')
    found = as_json(capsys, "study", file, "--dry-run")
    assert [(run["name"], run["finished"]) for run in found["runs"]] == [("r1", False), ("r2", False)]
    assert not (tmp_path / "out").exists()
    assert main(["study", str(file), "--dry-run"]) == 0
    assert "2 runs, 2 of them to train: about " in capsys.readouterr().out


def test_a_dry_run_says_what_cannot_be_trained(capsys, tmp_path):
    file = study_file(tmp_path, '"lora.target_modules" = ["all-linear", "no_such_module"]')
    assert main(["study", str(file), "--dry-run"]) == 2
    assert "error: no_such_module: " in capsys.readouterr().out


def test_the_results_as_json(capsys, tmp_path):
    file = study_file(tmp_path, '"lora.r" = [1]')
    found = as_json(capsys, "study", file, "--output", tmp_path / "other")
    assert found == json.loads((tmp_path / "other" / "study.json").read_text("utf-8"))


def test_a_file_that_is_no_study_is_refused(capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[lora]\nr = 4\n", "utf-8")
    assert "no grid. List the values to compare under [study.grid]" in refused(capsys, "study", file)
