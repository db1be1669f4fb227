"""plot as it is typed: curves of several runs, a picture, and all that is wrong at once."""

import shutil
import sys
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from lorasmith.errors import MissingExtraError
from lorasmith.runs.plot import plot_loss
from tests.support.tiny import Watch, trained


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


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG\r\n\x1a\n"), ("a.svg", b"<?xml")])
def test_plot_draws_several_runs(folder, tmp_path, capsys, name, start):
    runs = [str(folder / "first"), str(folder / "second-20261124-101500")]
    assert main(["plot", *runs, "--output", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "first: training loss (smoothed); held-out loss: " in out
    assert "second-20261124-101500: training loss" in out
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name.endswith("svg"):
        assert "second-20261124-101500 held out" in (tmp_path / name).read_text("utf-8")


def test_plot_needs_matplotlib_for_the_picture_only(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(folder / "first")]) == 0
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[report\]'"):
        plot_loss([folder / "first"], tmp_path / "a.png")


def test_plot_says_all_that_is_wrong(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 0, "held_out_loss": 2.0}\n{"step": 1, "lo', "utf-8")
    words = [str(folder / "no run"), str(tmp_path / "empty"), "--output", str(tmp_path / "a.gif")]
    assert main(["plot", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3
    assert "no run/metrics.jsonl: cannot be read" in err[0]
    assert "no training step has finished yet" in err[1]
    assert "a.gif: the file name must end in .png or .svg" in err[2]
