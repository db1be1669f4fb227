"""Where a run stands in its study, on the files of studies that were not trained."""

import json
from pathlib import Path

import pytest

from lorasmith.runs.study.folder import PAGE, RESULT
from lorasmith.runs.study.place import Place, place_in_study
from lorasmith.system.ownership import mark
from tests.support.studies import made_up

SEEDS = (-0.01, 0.0, 0.01)
LOSSES = {"lora": {1e-4: 2.5, 1e-3: 2.0}, "full": {1e-4: 2.2, 1e-3: 2.001}}


@pytest.fixture
def place(tmp_path: Path):
    """The place of a run in a study of methods and learning rates, whose losses are given."""

    def find(run: str, losses=LOSSES, seeds=SEEDS) -> Place | None:
        found = made_up({name: {rate: [at and at + s for s in seeds] for rate, at in rates.items()}
                         for name, rates in losses.items()})  # fmt: skip
        text = json.dumps(found.to_json()).replace("lora.init_lora_weights", "training.method")
        mark(tmp_path, "study")
        (tmp_path / RESULT).write_text(text, "utf-8")
        return place_in_study(tmp_path / run)

    return find


def test_the_best_run(place, tmp_path):
    found = place("lora_lr0.001_seed1")
    assert (found.finding.key, found.finding.outcome, found.finding.sure) == ("study", "best", "likely")
    first, capacity, page = found.finding.evidence
    assert first == "By its held-out loss of 2.0000, this setting (lora, lr 0.001) is number 1 of 4."
    assert capacity == "By method, each at its best: lora: 2.0000; full: 2.0010 (no clear difference)."
    assert page == f"The page of the study: {tmp_path / PAGE}"
    assert found.steps == ()


def test_a_run_that_another_is_better_than(place, tmp_path):
    found = place("full_lr0.0001_seed0")
    assert (found.finding.outcome, found.finding.sure) == ("worse", "clear")
    assert found.finding.answer == "Another setting of the study is better: lora, lr 0.001."
    assert found.finding.evidence[0].endswith("is number 3 of 4.")
    assert "The best is lora, lr 0.001, with 2.0000. From it to this one: +0.2000" in found.finding.evidence[1]
    assert "over 3 seeds [" in found.finding.evidence[1]
    (step,) = found.steps
    assert step.command == f"lorasmith report {tmp_path / 'lora_lr0.001_seed0'}"
    assert place("full_lr0.0001_seed0", seeds=(0.0,)).finding.sure == "likely"


def test_a_run_that_cannot_be_told_apart_from_the_best(place):
    found = place("full_lr0.001_seed2")
    assert (found.finding.outcome, found.finding.sure, found.steps) == ("same", "unknown", ())
    assert "cannot be told apart from this one" in found.finding.answer


def test_a_single_method_is_not_compared(place):
    assert not any(
        "each at its best" in text for text in place("lora_lr0.001_seed1", {"lora": LOSSES["lora"]}).finding.evidence
    )


def test_a_run_that_cannot_be_compared(place, tmp_path):
    place("full_lr0.001_seed2")
    values = json.loads((tmp_path / RESULT).read_text("utf-8"))
    for setting in values["settings"]:
        setting["from_best"] = None
    (tmp_path / RESULT).write_text(json.dumps(values), "utf-8")
    found = place_in_study(tmp_path / "full_lr0.001_seed2").finding
    assert (found.outcome, found.answer.startswith("Not known: this setting and the best one")) == ("unknown", True)


def test_nothing_has_finished(place):
    found = place("lora_lr0.001_seed1", {"lora": {1e-3: None}}).finding
    assert (found.outcome, found.answer.startswith("Not known: no setting of the study")) == ("unknown", True)


def test_what_is_not_of_a_study_has_no_place(place, tmp_path):
    assert place("other") is None
    assert place_in_study(tmp_path) is None
    (tmp_path / RESULT).unlink()
    assert place_in_study(tmp_path / "lora_lr0.001_seed1") is None


@pytest.mark.parametrize("text", ["{", '{"version": 99}', '{"version": 1}'])
def test_a_broken_result_is_told(place, tmp_path, text):
    place("lora_lr0.001_seed1")
    (tmp_path / RESULT).write_text(text, "utf-8")
    found = place_in_study(tmp_path / "lora_lr0.001_seed1").finding
    assert (found.outcome, found.sure) == ("unknown", "unknown")
    assert found.evidence[0].startswith(f"{tmp_path / RESULT}: cannot be read (")
