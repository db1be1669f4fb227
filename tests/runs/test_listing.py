"""list: what it tells of runs by their files alone, and which states it knows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith import train
from lorasmith.cli.main import main
from lorasmith.errors import RunError
from lorasmith.runs.listing import RunInfo, find_runs
from tests.support.tiny import Watch, flags, model_folder, rows_file, settings, trained

LIGHT = "import sys; from lorasmith.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules)"


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one that died after step 3 of 4, and a broken one; the finished one is the oldest."""
    folder = tmp_path_factory.mktemp("all") / "runs"
    folder.mkdir()
    trained(folder / "first")

    def at_step(step: int) -> None:
        if step == 3:
            raise Crash

    with pytest.raises(Crash):
        trained(folder / "second-20261124-101500", Watch(at_step), save_every=2, eval_every=2)
    shutil.copytree(folder / "first", folder / "broken")
    (folder / "broken" / "summary.json").write_text("{", "utf-8")
    (folder / "no run").mkdir()
    return folder


def by_name(folder: Path) -> dict[str, RunInfo]:
    return {Path(info.run).name: info for info in find_runs(folder)}


def test_states_and_numbers(folder):
    found = by_name(folder)
    assert list(found) != ["no run"]
    assert found.keys() == {"first", "second-20261124-101500", "broken"}
    first, second, broken = (found[name] for name in ("first", "second-20261124-101500", "broken"))
    summary = json.loads((folder / "first" / "summary.json").read_text("utf-8"))
    assert (first.state, first.step) == ("finished", 4)
    assert (first.loss_before, first.loss_after) == (summary["loss_before"], summary["loss_after"])
    assert first.adapter_bytes == (folder / "first" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (first.base, first.data) == (str(model_folder()), (str(folder / "rows.jsonl"),))
    assert (second.state, second.step) == ("interrupted", 2)  # step 3 was done and not saved
    assert second.loss_before == first.loss_before
    assert second.loss_after is not None
    assert broken.state == "broken"
    assert "broken" in broken.problem


def test_the_newest_is_first_and_a_run_alone_is_listed(folder):
    dates = [info.date for info in find_runs(folder)]
    assert dates == sorted(dates, reverse=True)
    assert [info.run for info in find_runs(folder / "first")] == [str(folder / "first")]
    with pytest.raises(RunError, match="the folder does not exist"):
        find_runs(folder / "nowhere")


def test_a_run_that_trains_is_running_until_its_process_ends(tmp_path):
    run, states = tmp_path / "run", []

    def at_step(step: int) -> None:
        states.append(find_runs(run)[0].state)
        if step == 1:
            with pytest.raises(
                RunError, match=rf"is in use by process {os.getpid()}\. Wait until it has finished, or stop it"
            ):
                train(rows_file(tmp_path / "rows.jsonl"), output=run, overwrite=True, **settings())
        if step == 3:
            raise Crash

    with pytest.raises(Crash):
        trained(run, Watch(at_step))
    assert states == ["running"] * 3
    assert find_runs(run)[0].state == "interrupted"
    trained(run, resume=True)
    assert find_runs(run)[0].state == "finished"


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


# --- train without a base


def test_train_says_which_base_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lorasmith.loading.folder.packaged_model", lambda _name, _report: model_folder())
    options = settings()
    options.pop("model")
    assert main(["train", rows_file(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run"), *flags(options)]) == 0
    out = capsys.readouterr().out
    assert "No base model given; using smollm2-135m-instruct" in out
    assert "Choose another one with --model" in out
    assert 'model = "smollm2-135m-instruct"' in (tmp_path / "run" / "config.toml").read_text("utf-8")
    assert main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert "No base model" not in capsys.readouterr().out
