"""The demo on a tiny model: it trains, generates replies, and shows a finished run without training again."""

import json
from pathlib import Path

import pytest

from lorasmith.demo import run as demo_module
from lorasmith.demo.run import BATCH, MAX_LENGTH, demo, demo_config
from tests.support.tiny import Watch, model_folder, row, rows_file

OPENING = "Tell me why the sky is blue, please."


@pytest.fixture
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a tiny model and a few rows; no network is needed."""
    monkeypatch.chdir(tmp_path)
    rows = [row(i) for i in range(4)]
    for one in rows:
        one["messages"][0]["content"] = OPENING  # type: ignore[index]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    files = Path(rows_file(tmp_path / "rows.jsonl")), tmp_path / "held.jsonl"
    monkeypatch.setattr(demo_module, "MODEL", str(model_folder()))
    monkeypatch.setattr(demo_module, "demo_files", lambda _report: files)


@pytest.mark.usefixtures("_tiny")
def test_it_trains_once_and_is_shown_again(monkeypatch):
    report = Watch()
    result = demo(report, steps=2, output="demo")
    assert result.summary.steps == 2
    assert [step for step, _loss in result.training] == [1, 2]
    assert [reply.prompt for reply in result.samples] == [OPENING] * 3
    assert any("Fine-tuning SmolLM2-135M" in text for text in report.said)

    monkeypatch.setattr(demo_module, "train", lambda *_args, **_more: pytest.fail("trained again"))
    again = Watch()
    assert demo(again, steps=2, output="demo") == result
    assert any("has already finished after 2 steps" in text for text in again.said)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        demo(Watch(), steps=2, output="demo", overwrite=True)


@pytest.mark.usefixtures("_tiny")
def test_a_demo_that_was_stopped_before_its_replies_makes_them():
    result = demo(Watch(), steps=2, output="demo")
    Path("demo/samples.json").unlink()
    assert demo(Watch(), steps=2, output="demo") == result


def test_its_configuration_is_that_of_train():
    config = demo_config(7, "out", Path("a.jsonl"), Path("b.jsonl"))
    assert (config.data.data, config.data.held_out) == (("a.jsonl",), "b.jsonl")
    assert (config.data.max_length, config.data.too_long) == (MAX_LENGTH, "truncate")
    assert (config.training.max_steps, config.training.batch_size) == (7, BATCH)
    assert config.output == "out"
