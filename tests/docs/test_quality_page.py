"""docs/quality.md is what the committed results say, the files of the studies are complete, and their data is."""

import json
import re
from dataclasses import replace

import pytest
from tools import quality_page, study_data
from tools.pages import notes

from lorasmith.config.study import load_study
from lorasmith.i18n import using_language
from lorasmith.pages.study import charts, picture
from lorasmith.runs.study.result import StudyResult
from lorasmith.runs.study.run import run_study
from tests.support.paths import ROOT
from tests.support.studies import made_up
from tests.support.tiny import model_folder, rows_file

STUDIES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_is_what_the_results_say(language):
    assert quality_page.PAGES[language].read_text("utf-8") == quality_page.page(language), "make docs"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_pictures_are_those_of_the_results(language):
    for name, values in quality_page.results().items():
        with using_language(language):
            result = StudyResult.from_json(values)
            for number, chart in enumerate(charts(result), 1):
                path = quality_page.picture_of(name, number, language)
                assert path.read_text("utf-8") == picture(result, chart), f"{path}: make docs"


def test_a_result_is_on_the_page_with_its_machine_and_its_figures(tmp_path, monkeypatch):
    result = made_up({"lora": {1e-4: [2.5, 2.52, 2.48], 1e-3: [2.0, 2.01, 1.99]}, "dora": {1e-3: [2.2, 2.21, 2.19]}})
    (tmp_path / "reviews.json").write_text(json.dumps({"commit": "abc123", **result.to_json()}), "utf-8")
    monkeypatch.setattr(quality_page, "RESULTS", tmp_path)
    for language in ("en", "zh"):
        page = quality_page.page(language)
        assert "A processor" in page
        assert "abc123" in page
        assert re.search(r"\| init_lora_weights lora \| 0\.001 \| 2\.0000 \|", page)
        assert re.search(r"\| init_lora_weights dora \| 0\.001 \| 2\.2000 \| \+0\.2000 \[", page)
    assert "9 of 9 runs were trained" in quality_page.page("en")


def test_results_are_collected_with_the_commit_and_only_if_they_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_page, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(quality_page, "RESULTS", tmp_path / "results")
    folder = tmp_path / "runs" / "reviews"
    folder.mkdir(parents=True)
    values = json.loads(json.dumps(made_up({"lora": {1e-3: [2.0]}}).to_json()))
    (folder / "study.json").write_text(json.dumps(values), "utf-8")
    quality_page.collect()
    path = tmp_path / "results" / "reviews.json"
    found = json.loads(path.read_text("utf-8"))
    assert re.fullmatch("[0-9a-f]{10}", found.pop("commit"))
    assert found == values
    path.write_text(json.dumps({"commit": "earlier", **values}), "utf-8")
    quality_page.collect()
    assert json.loads(path.read_text("utf-8"))["commit"] == "earlier"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_read_and_has_its_section(path):
    study = load_study(path)
    assert study.folder.name == path.stem
    assert path.stem in notes("quality")["studies"]
    task = path.stem.removeprefix("quick-").split("-")[0]
    assert {cell.config.data.data for cell in study.cells} == {(f"build/studies/{task}.jsonl",)}


def test_a_quick_study_runs_on_a_tiny_model(tmp_path):
    """`make study-quick` in its smallest form: its file with another model, other rows and two steps."""
    study = load_study(ROOT / "studies" / "quick-conversations.toml", str(tmp_path / "out"))
    rows = rows_file(tmp_path / "rows.jsonl", range(40))
    cells = []
    for cell in study.cells[:4]:
        data = cell.config.data.model_copy(update={"data": (rows,), "held_out": 12.0, "max_length": 100})
        model = cell.config.model.model_copy(update={"model": str(model_folder()), "dtype": "float32"})
        training = cell.config.training.model_copy(update={"max_steps": 2})
        config = cell.config.model_copy(update={"data": data, "model": model, "training": training})
        cells.append(replace(cell, config=config))
    result = run_study(replace(study, cells=tuple(cells)))
    assert [cell.state for cell in result.cells] == ["finished"] * 4
    assert result.best is not None


def test_a_conversation_is_cut_after_an_answer():
    said = [{"role": ("user", "assistant")[i % 2], "content": str(i) * 100} for i in range(6)]
    assert study_data.beginning(said) == said[:2]
    short = [message | {"content": "x"} for message in said]
    assert study_data.beginning(short[:5]) == short[:4]
    assert study_data.beginning([said[0] | {"content": "x" * 400}, *said[1:]]) == []


def test_reviews_are_balanced_short_and_not_in_both_files():
    def lines(word: str) -> bytes:
        return "\n".join(
            [f"{word}的评论，编号 {i}" for i in range(1300)] + ["短", "两边都有的一条评论", "长" * 99]
        ).encode()

    rows = study_data.review_rows(lines("喜欢"), lines("讨厌"))
    labels = [row["messages"][1]["content"] for row in rows]
    assert (labels.count("好评"), labels.count("差评")) == (1200, 1200)
    assert all(("喜欢" in row["messages"][0]["content"]) == (row["messages"][1]["content"] == "好评") for row in rows)
    assert rows == study_data.review_rows(lines("喜欢"), lines("讨厌"))


def test_an_address_becomes_json_of_its_parts():
    street = "<StreetName>DR</StreetName> <StreetName>KING,</StreetName>"
    entry = f"<AddressString><AddressNumber>8128</AddressNumber> {street}</AddressString>"
    other = "<AddressString><PlaceName>Ute</PlaceName></AddressString>"
    files = [f"<AddressCollection>{text}</AddressCollection>".encode() for text in (entry, entry + other)]
    rows = study_data.address_rows(files)
    answers = {row["messages"][0]["content"].splitlines()[-1]: row["messages"][1]["content"] for row in rows}
    assert {text: json.loads(answer) for text, answer in answers.items()} == {
        "8128 DR KING,": {"AddressNumber": "8128", "StreetName": "DR KING"},
        "Ute": {"PlaceName": "Ute"},
    }
