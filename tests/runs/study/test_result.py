"""Settings over seeds, curves, and the comparison with the best setting."""

import json
import math

import pytest

from lorasmith.runs.study.result import StudyResult, collect, machine
from tests.support.studies import made_up, small_study

LORA = {1e-4: [2.5, 2.52, 2.48], 1e-3: [2.0, 2.01, 1.99], 1e-2: [2.2, None, 2.21]}
DORA = {1e-4: [2.4, 2.42, 2.38], 1e-3: [2.005, 2.0, 2.02]}


def test_the_best_setting_is_the_one_with_the_lowest_mean_whose_runs_all_finished():
    result = made_up({"lora": LORA, "dora": DORA})
    assert result.best.options == {"lora.init_lora_weights": "lora", "training.learning_rate": 1e-3}
    assert result.best.mean == pytest.approx(2.0)
    only = made_up({"lora": {1e-3: [1.0, None, 1.0], 1e-4: [2.0, 2.0, 2.0]}})
    assert only.best.options["training.learning_rate"] == 1e-4


def test_a_failed_seed_makes_the_mean_infinite_and_counts_in_the_median():
    setting = made_up({"lora": LORA}).settings[2]
    assert (setting.failed, setting.mean) == (1, math.inf)
    assert setting.median == pytest.approx(2.21)
    assert setting.losses == pytest.approx([2.2, 2.21])


def test_settings_are_compared_on_the_seeds_that_both_have():
    result = made_up({"lora": LORA, "dora": DORA})
    by_rate = {(s.options["lora.init_lora_weights"], s.options["training.learning_rate"]): s for s in result.settings}
    assert by_rate["lora", 1e-4].from_best.difference == pytest.approx(0.5)
    assert by_rate["lora", 1e-2].from_best.runs == 2
    assert by_rate["lora", 1e-4].from_best.exceeds_noise
    assert not by_rate["dora", 1e-3].from_best.exceeds_noise
    assert result.best.from_best is None


def test_curves_are_settings_that_differ_in_the_option_of_the_axis():
    result = made_up({"lora": LORA, "dora": {1e-2: [3.0], 1e-4: [2.0]}})
    assert [(curve.name, [s.options[result.axis] for s in curve.settings]) for curve in result.curves] == [
        ("init_lora_weights lora", [1e-4, 1e-3, 1e-2]),
        ("init_lora_weights dora", [1e-4, 1e-2]),
    ]
    assert result.curves[0].best.options[result.axis] == 1e-3


def test_the_result_is_json_without_what_json_does_not_have():
    text = json.dumps(made_up({"lora": LORA}).to_json(), allow_nan=False)
    assert json.loads(text)["settings"][2]["failed"] == 1


def test_a_result_is_read_back_as_it_was():
    result = made_up({"lora": LORA, "dora": DORA})
    text = json.dumps(result.to_json())
    assert StudyResult.from_json(json.loads(text)) == result
    with pytest.raises(ValueError, match="version 2"):
        StudyResult.from_json({"version": 2})


def test_cells_that_were_not_trained_are_open(tmp_path):
    result = collect(small_study(tmp_path))
    assert {cell.state for cell in result.cells} == {"open"}
    assert result.best is None
    assert result.examples == 0
    assert math.isinf(result.settings[0].mean)


def test_the_axis_is_the_learning_rate_or_the_option_with_the_most_numbers(tmp_path):
    def axis(grid: str) -> str:
        return collect(small_study(tmp_path, grid)).axis

    assert axis('"lora.r" = [1, 2, 4]\n"training.learning_rate" = [1e-3, 1e-2]') == "training.learning_rate"
    assert axis('"lora.r" = [1, 2, 4]\n"data.train_rows" = [4, 8]') == "lora.r"
    assert axis('"training.optimizer" = ["adamw", "muon"]\n"training.seed" = [1, 2, 3]') == ""


def test_the_machine_is_named():
    assert machine().keys() == {"processor", "cores", "threads", "lorasmith", "torch", "python"}
    assert machine()["processor"]
