"""Whole reports on small runs that were made to be underfit, overfit, or limited by their rank."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorasmith.config.data import DataConfig
from lorasmith.config.toml import Config
from lorasmith.config.training import TrainingConfig
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from lorasmith.runs.report import RunReport, changed_options, gaps_of, make_report
from lorasmith.runs.study.result import CellResult, combined
from lorasmith.system.ownership import mark
from lorasmith.training.run_files import read_summary
from tests.support.experts import moe_folder
from tests.support.preferences import pairs_file
from tests.support.tiny import Crash, Watch, crash_at, model_folder, rows_file, settings, train, trained


def outcomes(report: RunReport) -> dict[str, str]:
    return {key: finding.outcome for key, finding in report.findings.items()}


def whats(report: RunReport) -> list[str]:
    return [step.what for step in report.steps]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many rows and few rows to train on; 20 are held out of either."""
    folder = tmp_path_factory.mktemp("reports")
    rows_file(folder / "rows.jsonl", range(80))
    rows_file(folder / "few.jsonl", range(30))
    return folder


def report_on(folder: Path, name: str, rows: str = "rows.jsonl", **options: object) -> RunReport:
    train(str(folder / rows), **{"output": folder / name} | settings(held_out=20, **options))
    return make_report(folder / name)


@pytest.fixture(scope="module")
def small_rank(folder: Path) -> RunReport:
    return report_on(folder, "rank2", r=2, max_steps=100, learning_rate=3e-2)


@pytest.fixture(scope="module")
def overfit(folder: Path) -> RunReport:
    options = {"max_steps": 160, "learning_rate": 5e-2, "schedule": "constant", "eval_every": 8}
    return report_on(folder, "over", "few.jsonl", r=16, **options)


def test_a_rank_that_is_too_small(small_rank):
    assert outcomes(small_rank)["rank"] == "used"
    assert "A larger rank" in whats(small_rank)
    assert small_rank.evidence.half.high < 0.6


def test_a_rank_that_is_large_enough(folder):
    report = report_on(folder, "rank16", r=16, max_steps=100, learning_rate=3e-2)
    assert outcomes(report)["rank"] == "spare"
    assert "A larger rank" not in whats(report)


def test_a_training_that_was_too_short(small_rank, overfit):
    assert outcomes(small_rank)["falling"] == "falling"
    assert "Train for longer" in whats(small_rank)
    assert outcomes(overfit)["falling"] != "falling"
    assert "Train for longer" not in whats(overfit)


def test_a_training_that_was_too_long(small_rank, overfit):
    assert outcomes(overfit)["gap"] == "harmful"
    assert whats(overfit) == ["Stop earlier", "More data"]
    assert overfit.subject.step < overfit.subject.steps
    assert overfit.evidence.later.low > 0
    assert outcomes(small_rank)["gap"] == "closed"
    assert not {"Stop earlier", "More data"} & {*whats(small_rank)}


def test_an_adapter_that_does_harm(small_rank, folder, tmp_path):
    """Its B has the opposite sign and is too large, as after steps that were far too large."""
    run = tmp_path / "run"
    shutil.copytree(folder / "rank2", run)
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({key: -20 * t if "lora_B" in key else t for key, t in load_file(file).items()}, file)
    report = make_report(run)
    assert outcomes(report)["learned"] == "worse"
    assert outcomes(report)["rank"] == "unknown"
    assert whats(report) == ["A lower learning rate"]
    assert outcomes(small_rank)["learned"] == "better"
    assert "A lower learning rate" not in whats(small_rank)


def test_facts_say_what_was_trained_on_what(small_rank):
    facts = dict(small_rank.facts)
    assert facts["examples"] == "60 to train on, 20 held out"
    assert facts["data"] == "rows.jsonl"
    assert facts["adapter"].startswith("r 2, lora_alpha 16; down_proj")
    assert "100 steps" in facts["training"]
    assert "learning_rate = 0.03" in facts["options that differ from the defaults"]
    assert facts["versions"].startswith("lorasmith ")
    assert "processes" not in facts["machine"]


def test_everything_is_plain_values(small_rank, overfit):
    found = json.loads(json.dumps(overfit.to_json()))
    assert found["later"]["examples"] == 20
    assert len(found["layers"]) == 14
    assert set(found["findings"]) == {"learned", "forgotten", "falling", "gap", "rank"}
    assert json.loads(json.dumps(small_rank.to_json()))["later"] is None


def test_quick_reads_files_only(small_rank, folder, monkeypatch):
    monkeypatch.setattr("lorasmith.adapters.session.load_base", None)
    quick = make_report(folder / "rank2", quick=True)
    assert outcomes(quick) == outcomes(small_rank) | {"forgotten": "unknown", "gap": "unknown", "rank": "unknown"}
    assert quick.evidence.learned.examples == 20
    assert quick.evidence.learned.after == pytest.approx(small_rank.evidence.learned.after, rel=1e-6)
    summary = folder / "rank2" / "summary.json"
    text = summary.read_text("utf-8")
    old = {key: value for key, value in json.loads(text).items() if not key.endswith("_examples")}
    try:
        summary.write_text(json.dumps(old), "utf-8")
        assert read_summary(folder / "rank2").held_out_examples is None
        without = make_report(folder / "rank2", quick=True)
    finally:
        summary.write_text(text, "utf-8")
    assert without.findings["learned"].outcome == "unknown"
    assert "earlier version" in without.problems[1]


def test_an_unfinished_run_and_one_that_was_resumed(tmp_path):
    with pytest.raises(Crash):
        trained(tmp_path / "run", crash_at(3), save_every=2)
    report = make_report(tmp_path / "run")
    assert (report.subject.state, report.subject.step) == ("interrupted", 2)
    assert report.findings["learned"].evidence
    trained(tmp_path / "run", resume=True, save_every=2)
    assert make_report(tmp_path / "run", quick=True).subject.state == "finished"


def test_several_processes_are_told(small_rank, folder):
    file = folder / "rank2" / "environment.json"
    text = file.read_text("utf-8")
    try:
        file.write_text(text.replace('"processes": "1"', '"processes": "2"'), "utf-8")
        facts = dict(make_report(folder / "rank2", quick=True).facts)
    finally:
        file.write_text(text, "utf-8")
    assert "2 processes" in facts["machine"]


def test_dora_is_reported_with_what_is_left_out(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", range(40))
    train(rows, **{"output": tmp_path / "run"} | settings(held_out=12, use_dora=True, max_steps=12))
    report = make_report(tmp_path / "run")
    assert any("DoRA also trains" in text for text in report.problems)
    assert report.evidence.half is not None
    assert 0 < report.evidence.half.value < 1.5


def test_experts_have_spectra_and_half_of_them(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", range(40))
    model = str(moe_folder(tmp_path / "moe", "qwen3_moe"))
    options = settings(held_out=12, max_steps=12, model=model, r=8, target_modules="all-linear")
    train(rows, **{"output": tmp_path / "run"} | options)
    report = make_report(tmp_path / "run")
    experts = [one for one in report.spectra if ".experts" in one.path]
    assert len(experts) == 2  # of one layer: up and gate, and down
    assert {one.values_ES.shape for one in experts} == {(4, 4)}  # r is divided by the two experts of a token
    assert report.evidence.half is not None
    assert 0 < report.evidence.half.value < 1.5


def test_what_is_trained_in_full_is_told(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", range(40))
    train(rows, **{"output": tmp_path / "run"} | settings(held_out=12, modules_to_save=["lm_head"], max_steps=12))
    assert any("trained in full (lm_head)" in text for text in make_report(tmp_path / "run", quick=True).problems)
    train(rows, **{"output": tmp_path / "plain"} | settings(held_out=12, max_steps=12))
    assert not any("trained in full" in text for text in make_report(tmp_path / "plain", quick=True).problems)


def test_a_run_on_preferences(tmp_path):
    pairs = pairs_file(tmp_path / "pairs.jsonl")
    train(pairs, **{"output": tmp_path / "run"} | settings(method="dpo", learning_rate=5e-3, eval_every=1))
    report = make_report(tmp_path / "run")
    (wanted,) = evaluate([tmp_path / "run"], EvaluationOptions(forget="")).adapters
    assert report.evidence.learned == wanted.loss
    assert report.evidence.forgotten == wanted.forgotten
    assert report.findings["learned"].evidence[0].startswith("held-out preference loss")
    assert report.findings["rank"].outcome == report.findings["gap"].outcome.replace("unclear", "unknown") == "unknown"
    assert any("The run is on preferences (dpo)" in text for text in report.problems)
    quick = make_report(tmp_path / "run", quick=True)
    assert quick.findings["learned"].outcome == "unknown"
    assert any("only judged without --quick" in text for text in quick.problems)


@pytest.fixture(scope="module")
def full(folder: Path) -> RunReport:
    return report_on(folder, "full", method="full", learning_rate=3e-3, max_steps=60)


def test_a_run_of_all_weights_is_compared_with_what_it_was(full):
    (wanted,) = evaluate([full.subject.folder], EvaluationOptions(forget="")).adapters
    assert full.evidence.learned == wanted.loss
    assert full.evidence.forgotten == wanted.forgotten
    assert full.evidence.gap is not None
    assert len(full.evidence.shown) == 6
    facts = dict(full.facts)
    assert facts["all weights"].startswith(f"{full.subject.summary.trainable_parameters:,} parameters, ")
    assert facts["base model"] == str(model_folder())
    assert "adapter" not in facts
    assert [*full.findings] == ["learned", "forgotten", "falling", "gap", "full"]
    assert outcomes(full)["full"] == "others"  # its embeddings and head are most of it
    found = json.loads(json.dumps(full.to_json()))
    assert set(found["ranks"]) == {"8", "64"}
    assert found["linear_layers"]["examples"] == 20
    assert len(found["layers"]) == 14


def test_quick_on_a_run_of_all_weights(full, monkeypatch):
    monkeypatch.setattr("lorasmith.adapters.session.load_base", None)
    quick = make_report(full.subject.folder / "model", quick=True)
    assert outcomes(quick)["learned"] == outcomes(full)["learned"] == "better"
    assert outcomes(quick)["full"] == "unknown"
    assert quick.spectra == []


def test_the_run_of_a_study_has_its_place_there(small_rank, folder, tmp_path):
    assert "study" not in small_rank.findings
    mark(tmp_path, "study")
    cell = CellResult("run", {"lora.r": 2}, 0, "finished", loss=small_rank.evidence.learned)
    result = combined("s", "m", ("rows.jsonl",), 20, "", [cell], {}, {})
    (tmp_path / "study.json").write_text(json.dumps(result.to_json()), "utf-8")
    shutil.copytree(folder / "rank2", tmp_path / "run")
    report = make_report(tmp_path / "run", quick=True)
    assert [*report.findings][-1] == "study"
    assert outcomes(report)["study"] == "best"


def test_a_report_shows_progress(small_rank, folder):
    watch = Watch()
    make_report(folder / "rank2", quick=True, report=watch)
    assert set(watch.tasks) == {"singular values"}
    assert len(watch.tasks) == 14


def test_the_gap_is_taken_against_the_training_since_the_last_evaluation():
    training = [(1, 5.0), (2, 4.0), (3, 2.0), (4, 1.0)]
    assert gaps_of(training, [(0, 6.0), (2, 4.75), (4, 3.0)]) == [(2, 0.25), (4, 1.5)]
    assert gaps_of([], [(0, 6.0)]) == []


def test_changed_options_leave_out_what_is_shown_elsewhere():
    assert changed_options(Config()) == []
    config = Config(
        data=DataConfig(data=("a.jsonl",), held_out="/data/held.jsonl"), training=TrainingConfig(learning_rate=1e-3)
    )
    assert changed_options(config) == ["held_out = held.jsonl", "learning_rate = 0.001"]
