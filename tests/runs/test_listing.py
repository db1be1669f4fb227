"""The runs in a folder and their states, read from their files."""

import json
import os
from pathlib import Path

import pytest

from lorasmith import train
from lorasmith.errors import RunError
from lorasmith.runs.listing import RunInfo, find_runs
from tests.support.runs import runs_in_all_states
from tests.support.tiny import Crash, Watch, model_folder, rows_file, settings, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, an interrupted one and a broken one."""
    return runs_in_all_states(tmp_path_factory.mktemp("all") / "runs")


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
