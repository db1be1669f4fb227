"""`list` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from tests.support.runs import runs_in_all_states

LIGHT = "import sys; from lorasmith.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, an interrupted one and a broken one."""
    return runs_in_all_states(tmp_path_factory.mktemp("all") / "runs")


def test_list_fits_80_columns_and_loads_no_torch(folder):
    words = [sys.executable, "-c", LIGHT, "list", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "False"
    table = [line for line in lines if not line.startswith(("warning:", "resume:"))]
    assert all(len(line) <= 80 for line in table)
    text = "\n".join(lines)
    assert "second-20261124" in text
    assert f"resume: lorasmith train --output {folder / 'second-20261124-101500'} --resume" in text
    assert [line for line in table if line.startswith("first ") and "finished" in line and "->" in line]


def test_plain_list_says_one_whole_fact_a_line(folder, capsys, monkeypatch):
    monkeypatch.setenv("LORASMITH_PLAIN", "1")
    assert main(["list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(": " in line and "\N{HORIZONTAL ELLIPSIS}" not in line for line in lines if "resume: " not in line)
    assert "state: finished" in lines


def test_list_as_json(folder, capsys):
    assert main(["list", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {run["state"] for run in found["runs"]} == {"finished", "interrupted", "broken"}


def test_list_without_runs_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "No runs in runs. Start one with: lorasmith train DATA\n"
    assert main(["list", "elsewhere"]) == 2
