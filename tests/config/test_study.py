"""The file of a study: its grids, the names of its cells, and what is refused."""

from pathlib import Path

import pytest

from lorasmith.config.study import MOST_CELLS, cell_name, known_keys, load_study, setting_text
from lorasmith.errors import ConfigError


@pytest.fixture
def written(tmp_path):
    def written(text: str) -> Path:
        path = tmp_path / "rates.toml"
        path.write_text(text, "utf-8")
        return path

    return written


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_study(path)
    return "\n".join(error.value.problems)


def test_every_combination_is_a_run_of_its_own(written):
    study = load_study(
        written('[lora]\nlora_alpha = 32\n[study.grid]\n"lora.r" = [1, 8]\n"training.learning_rate" = [1e-4, 3e-4]')
    )
    assert study.folder == Path("runs/rates")
    assert study.keys == ("lora.r", "training.learning_rate")
    assert [cell.name for cell in study.cells] == ["r1_lr0.0001", "r1_lr0.0003", "r8_lr0.0001", "r8_lr0.0003"]
    assert [(c.config.lora.r, c.config.training.learning_rate) for c in study.cells] == [
        (1, 1e-4), (1, 3e-4), (8, 1e-4), (8, 3e-4),
    ]  # fmt: skip
    assert {cell.config.lora.lora_alpha for cell in study.cells} == {32}
    assert [cell.config.output for cell in study.cells] == [f"runs/rates/{cell.name}" for cell in study.cells]


def test_several_grids_are_joined_and_a_combination_of_both_is_trained_once(written):
    study = load_study(
        written(
            'output = "o"\n[[study.grid]]\n"lora.r" = [1, 8]\n"training.seed" = [0]\n'
            "[[study.grid]]\nlora.r = [8, 64]\ntraining.seed = 0\n"
        )
    )
    assert [cell.options for cell in study.cells] == [{"lora.r": r, "training.seed": 0} for r in (1, 8, 64)]


def test_a_list_is_a_value_of_an_option_that_takes_a_list(written):
    study = load_study(written('[study.grid]\n"lora.target_modules" = ["all-linear", ["q_proj", "v_proj"]]'))
    assert [cell.name for cell in study.cells] == ["all-linear", "q_proj+v_proj"]
    assert study.cells[1].config.lora.target_modules == ("q_proj", "v_proj")


def test_all_seeds_hold_out_the_same_rows(written):
    grid = '[study.grid]\n"training.seed" = [1, 2]'
    study = load_study(written(f"[training]\nseed = 5\n{grid}"))
    assert {cell.config.data.held_out_seed for cell in study.cells} == {5}
    study = load_study(written(f"[data]\nheld_out_seed = 9\n{grid}"))
    assert {cell.config.data.held_out_seed for cell in study.cells} == {9}
    study = load_study(written(f'[data]\nheld_out = "held.jsonl"\n{grid}'))
    assert {cell.config.data.held_out_seed for cell in study.cells} == {None}


def test_names_of_cells_can_be_names_of_folders():
    assert cell_name({"training.learning_rate": 1e-05, "data.train_rows": 0.5}) == "lr1e-05_rows0.5"
    assert cell_name({"lora.use_dora": True, "training.optimizer": "lion"}) == "use_doratrue_optimizerlion"
    odd = cell_name({"lora.target_modules": r".*(q|v)_proj/\..*"})
    assert "/" not in odd
    assert odd != cell_name({"lora.target_modules": r".*(q|v)_proj..*"})
    assert len(cell_name({"lora.target_modules": ["a_long_name"] * 30})) < 60


def test_a_setting_in_words():
    assert setting_text({"lora.r": 8, "training.learning_rate": 3e-4}) == "r 8, lr 0.0003"
    assert setting_text({"lora.target_modules": "all-linear"}) == "all-linear"
    assert setting_text({"lora.rank_pattern": {"q_proj": 4}}) == "rank_pattern q_proj=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lora]\nr = 8", "no grid. List the values to compare under [study.grid]"),
        ("study = 3", "no grid."),
        ("[study.grid]", "no grid."),
        ('[study.grid]\n"lora.rank" = [1]', "study.grid: unknown option 'lora.rank'."),
        ('[study.grid]\n"trainin.seed" = [1]', "Did you mean 'training.seed'?"),
        ('[study.grid]\nseed = [1]', "Did you mean 'training.seed'?"),
        ('[study.grid]\n"lora.r" = []', "study.grid: lora.r has no values."),
        ("[study]\ngrid = [3]", "study.grid: must be a table of options with lists of values."),
        ('[study]\nforgetting = true\n[study.grid]\n"lora.r" = [1]', "study.forgetting: unknown key"),
        ('[study.grid]\n"lora.r" = [8, -1]', "r-1: lora.r: invalid value -1"),
        ('[lora]\nr = "x"\n[study.grid]\n"lora.r" = [8]', "lora.r: invalid value 'x'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(written, text, message):
    assert message in refused(written(text))


def test_runs_on_different_losses_are_refused(written):
    text = refused(written('[study.grid]\n"training.method" = ["full", "lora", "dpo", "orpo"]'))
    assert "study.grid: the runs lora, dpo, orpo are trained on different losses, which cannot be compared" in text
    assert "different losses" in refused(
        written('[training]\nmethod = "dpo"\n[study.grid]\n"preference.beta" = [0.1, 0.5]')
    )
    assert len(load_study(written('[study.grid]\n"training.method" = ["full", "lora"]')).cells) == 2


def test_a_study_of_very_many_runs_is_refused(written):
    seeds = list(range(50))
    text = f'[study.grid]\n"training.seed" = {seeds}\n"lora.r" = {seeds[1:]}'
    assert f"2,450 runs; a study can have at most {MOST_CELLS:,}" in refused(written(text))


def test_every_option_can_be_in_a_grid():
    assert {"training.learning_rate", "lora.r", "data.train_rows", "model.dtype"} <= set(known_keys())
    assert "output" not in known_keys()
