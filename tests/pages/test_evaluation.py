"""The page of an evaluation: one file that fetches nothing, with every score, curve and answer."""

import json
import re
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from lorasmith.pages.evaluation import HEIGHT, MOST_POINTS, WIDTH, loss_curve
from tests.support.html_page import Page
from tests.support.tiny import rows_file, trained

SPOILED = "<script>alert('&')</script> 你好"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs that held out the same rows."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("short", 3), ("long", 6)):
        trained(folder / name, max_steps=steps)
    return [str(folder / "short"), str(folder / "long")]


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Rows of the user's, whose texts would be tags if nobody took care."""
    file = tmp_path / "own.jsonl"
    rows_file(file, range(30, 41))
    row = {"messages": [{"role": "user", "content": SPOILED}, {"role": "assistant", "content": SPOILED}]}
    file.write_text(json.dumps(row) + "\n" + file.read_text("utf-8"), "utf-8")
    return str(file)


def test_a_page_to_send(capsys, runs, own, tmp_path):
    page = tmp_path / "page.html"
    words = [*runs, own, "--generate", "12", "--max-new-tokens", "8", "--forget", "--html", str(page), "--json"]
    assert main(["eval", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    text = page.read_text("utf-8")
    read = Page(text)
    assert read.open == []
    assert read.links == []
    assert not re.search(r"//|url\(|@import", text), "it fetches something"
    assert "script" not in read.seen
    assert read.text.count(SPOILED) == 2  # what was asked, and reference answer
    assert read.seen.count("svg") == 2
    assert "prefers-color-scheme: dark" in text
    for adapter in found["adapters"]:
        assert f"{adapter['loss']['after']:.4f}" in read.text
        assert f"{adapter['scores']['chrf']['after']:.1f}" in read.text
        assert f"{adapter['forgotten']['after']:.4f}" in read.text
        assert adapter["loss"]["verdict"] in read.text
    assert len(found["samples"]) == 12
    assert all(sample["adapters"][1]["text"].strip() in read.text for sample in found["samples"])
    assert list(tmp_path.glob(".*")) == []


def _run(folder: Path, lines: list[dict[str, float]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


def test_a_curve_spans_the_picture(tmp_path):
    lines = [{"step": k, "loss": 5.0 - k} for k in (1, 2, 3)] + [{"step": 0, "held_out_loss": 6.0}]
    curve = loss_curve(_run(tmp_path, lines), "mine")
    assert (curve.name, curve.first, curve.last) == ("mine", 0, 3)
    assert (curve.high, curve.dots) == (6.0, [(0.0, 0.0)])
    points = [tuple(map(float, point.split(","))) for point in curve.training.split()]
    assert points[-1] == (WIDTH, HEIGHT)
    assert curve.held_out == "0,0"


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    curve = loss_curve(_run(tmp_path, [{"step": k, "loss": 2.0 + 1 / k} for k in range(1, 2001)]), "long")
    points = curve.training.split()
    assert len(points) <= MOST_POINTS + 1
    assert points[-1].startswith(f"{WIDTH},")


def test_no_curve_of_an_adapter_folder_or_of_a_single_step(tmp_path):
    assert loss_curve(tmp_path, "bare") is None
    assert loss_curve(_run(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}]), "one") is None
