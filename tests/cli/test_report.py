"""report as it is typed: the page, what is said on the screen, and what is wrong before minutes are spent."""

from pathlib import Path

import pytest

from lorasmith.cli.main import main
from tests.support.commands import as_json, refused, said
from tests.support.tiny import Crash, crash_at, rows_file, settings, train, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 12 held-out examples."""
    folder = tmp_path_factory.mktemp("report")
    rows = rows_file(folder / "rows.jsonl", range(40))
    train(rows, **{"output": folder / "run"} | settings(held_out=12, max_steps=18))
    return folder / "run"


def test_one_command_writes_the_page_into_the_run(run, capsys):
    out = said(capsys, "report", run)
    assert "Did it learn? Yes: the held-out loss fell by" in out
    assert "What did it forget? " in out
    assert f"Wrote {run / 'report.html'}" in out
    assert "Answers side by side" in (run / "report.html").read_text("utf-8")


def test_the_page_does_not_keep_a_run_from_being_replaced(tmp_path, capsys):
    trained(tmp_path / "run")
    said(capsys, "report", tmp_path / "run", "--quick")
    trained(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "report.html").exists()


def test_quick_in_chinese_elsewhere(run, tmp_path, capsys):
    page = tmp_path / "seite.html"
    assert main(["--lang", "zh", "report", str(run), "--quick", "--output", str(page)]) == 0
    assert "学到东西了吗？" in capsys.readouterr().out
    assert "训练报告" in page.read_text("utf-8")


def test_json_has_every_finding(run, capsys):
    found = as_json(capsys, "report", run, "--quick")
    assert found["findings"]["learned"]["outcome"] == "better"
    assert found["page"] == str(run / "report.html")
    assert len(found["layers"]) == 14


def test_data_of_the_user(run, tmp_path, capsys):
    data = rows_file(tmp_path / "own.jsonl", range(60, 75))
    found = as_json(capsys, "report", run, data, "--output", tmp_path / "page.html")
    assert found["learned"]["examples"] == 15


def test_what_is_wrong_is_said_first(run, tmp_path, capsys):
    assert "must be a file in an existing folder" in refused(capsys, "report", run, "--output", tmp_path)
    assert "cannot evaluate own.jsonl" in refused(capsys, "report", run, "own.jsonl", "--quick")
    with pytest.raises(Crash):
        trained(tmp_path / "fresh", crash_at(1))
    assert "has no adapter yet" in refused(capsys, "report", tmp_path / "fresh")
