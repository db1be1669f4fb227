"""The folder of a study: what it is recognized by, and what a changed file may change."""

import json
from dataclasses import replace

import pytest

from lorasmith.errors import RunError
from lorasmith.report import Report
from lorasmith.runs.study.folder import PLAN, options_of, settle, study_lock
from lorasmith.system.ownership import is_marked
from tests.support.studies import small_study
from tests.support.tiny import Watch


def settled(study, report=None):
    with study_lock(study.folder, Report()):
        return settle(study, report or Report())


def refusal(study) -> str:
    with pytest.raises(RunError) as error:
        settled(study)
    return "\n".join(error.value.problems)


def test_a_study_marks_its_folder_and_writes_down_its_runs(tmp_path):
    study = settled(small_study(tmp_path))
    assert is_marked(study.folder, "study")
    plan = json.loads((study.folder / PLAN).read_text("utf-8"))
    assert list(plan["cells"]) == [cell.name for cell in study.cells]
    assert plan["cells"]["r1_lr0.001_seed0"]["lora.r"] == 1


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    study = small_study(tmp_path)
    study.folder.mkdir()
    (study.folder / "mine.txt").write_text("", "utf-8")
    assert "contains files, but not those of a study. Choose another --output." in refusal(study)
    assert [path.name for path in study.folder.iterdir()] == ["mine.txt"]
    file = replace(study, folder=study.folder / "mine.txt")
    assert "is a file, not a folder" in refusal(file)


def test_added_runs_keep_the_names_of_those_that_are_there(tmp_path):
    settled(small_study(tmp_path, '"lora.r" = [1, 4]'))
    watch = Watch()
    more = settled(small_study(tmp_path, '"lora.r" = [1, 4, 8]\n"training.seed" = [0, 1]'), watch)
    assert [cell.name for cell in more.cells] == ["r1", "r1_seed1", "r4", "r4_seed1", "r8_seed0", "r8_seed1"]
    assert more.cells[0].options == {"lora.r": 1, "training.seed": 0}
    assert more.cells[0].config.output == str(more.folder / "r1")
    assert watch.said == [f"{more.folder}: 4 runs are added to the 2 that the study had."]
    again = settled(small_study(tmp_path, '"lora.r" = [1, 4, 8]\n"training.seed" = [0, 1]'))
    assert again == more


def test_a_changed_option_is_refused_by_name(tmp_path):
    settled(small_study(tmp_path))
    text = refusal(small_study(tmp_path, training="clip = 0.5"))
    assert "has runs that its file does not have any more" in text
    assert "r1_lr0.001_seed0: training.clip was 1.0, now 0.5" in text
    assert "r1_lr0.01_seed0" in refusal(small_study(tmp_path, '"lora.r" = [1, 4]\n"training.learning_rate" = [1e-3]'))


def test_a_name_that_is_taken_by_another_run_gets_a_number(tmp_path):
    settled(small_study(tmp_path, '"lora.r" = [4]'))
    cells = settled(small_study(tmp_path, '"lora.r" = [4]\n"lora.lora_alpha" = [16, 32]', more="")).cells
    assert [cell.name for cell in cells] == ["r4", "r4_alpha32"]


def test_an_option_that_an_older_version_did_not_have_has_its_default(tmp_path):
    study = settled(small_study(tmp_path))
    plan = json.loads((study.folder / PLAN).read_text("utf-8"))
    for options in plan["cells"].values():
        del options["training.clip"]
    (study.folder / PLAN).write_text(json.dumps(plan), "utf-8")
    assert settled(small_study(tmp_path)) == study


def test_a_broken_plan_is_said(tmp_path):
    study = settled(small_study(tmp_path))
    (study.folder / PLAN).write_text("{", "utf-8")
    assert "plan.json: not in the format that a study writes" in refusal(small_study(tmp_path))


def test_options_are_those_of_json(tmp_path):
    options = options_of(small_study(tmp_path).cells[0].config)
    assert options == json.loads(json.dumps(options))
    assert "output" not in options
