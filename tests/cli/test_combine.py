"""`combine` as it is typed."""

import json
from pathlib import Path

import pytest

from lorasmith.cli.combine import weighted
from lorasmith.errors import ConfigError
from tests.adapters.test_combine import adapter_of
from tests.support.commands import as_json, refused, said
from tests.support.serving import HI, running
from tests.support.tiny import model_folder, rows_file, trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs on one base, of different ranks."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "one", r=4)
    trained(folder / "two", r=8, seed=3, lora_alpha=4)
    return folder / "one", folder / "two"


def test_combine(capsys, runs, tmp_path):
    one, two = runs
    out = tmp_path / "both"
    lines = said(capsys, "combine", one, f"{two}=0.5", "--output", out).splitlines()
    assert lines[-2] == f"Combined adapter: {out} (cat, rank 12)"
    assert lines[-1].startswith("Relative error against the exact weighted sum: ")
    assert lines[-1].endswith(", which is rounding")
    assert "already exists" in refused(capsys, "combine", one, two, "--output", out)
    found = as_json(capsys, "combine", one, two, "--output", out, "--overwrite", "--method", "svd", "--rank", 3)
    assert (found["folder"], found["method"], found["rank"]) == (str(out), "svd", 3)
    layers = found["layers"]
    assert isinstance(layers, list)
    assert {"path", "error", "norm"} == layers[0].keys()
    assert 0 < float(str(found["error"])) < 1
    told = said(capsys, "info", out)
    assert "r 3, lora_alpha 3" in told
    assert f"made of   {one / 'adapter'} (1), {two / 'adapter'} (1), with svd" in told.replace("\n" + " " * 9, "")


def test_an_error_is_shown_by_layer_with_the_worst_first(capsys, runs, tmp_path):
    one, two = runs
    text = said(capsys, "combine", f"{one}=1", f"{one}=-0.5", f"{two}=-1", "--method", "svd", "--rank", 1,
                "--output", tmp_path / "out")  # fmt: skip
    assert "Relative error against the exact weighted sum: " in text
    shown = [line.split() for line in text.splitlines() if line.startswith("model.layers.")]
    errors = [float(share.rstrip("%")) for _path, share in shown]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert "layers not shown, with smaller errors: 4;" in text
    assert "svd keeps the largest directions only. Give a larger --rank" in text


def test_linear_says_aloud_what_it_is_not(capsys, tmp_path):
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2)
    text = said(capsys, "combine", one, two, "--method", "linear", "--output", tmp_path / "out")
    assert "linear adds up A and B apart, so their product also contains A of one adapter times B of another." in text


def test_pruning_says_that_it_does_not_aim_at_the_sum(capsys, runs, tmp_path):
    options = ["--method", "ties_svd", "--density", 0.5, "--majority-sign-method", "frequency", "--rank", 4]
    text = said(capsys, "combine", *runs, *options, "--output", tmp_path / "out")
    assert "ties_svd does not aim at this sum, because it leaves out values on purpose." in text


def test_rows_that_one_of_them_was_trained_on_are_named(capsys, runs, tmp_path):
    one, two = runs
    rows = rows_file(tmp_path / "rows.jsonl")
    said(capsys, "combine", one, two, "--output", tmp_path / "both")
    said(capsys, "combine", tmp_path / "both", "--output", tmp_path / "again")
    for name in ("both", "again"):
        assert f"warning: {name} was trained on" in said(capsys, "eval", tmp_path / name, rows)
    fresh = rows_file(tmp_path / "fresh.jsonl", range(20, 32))
    assert "warning" not in said(capsys, "eval", tmp_path / "again", fresh)


def test_training_continues_from_the_result(capsys, runs, tmp_path):
    said(capsys, "combine", *runs, "--output", tmp_path / "both")
    trained(tmp_path / "run", start_from=str(tmp_path / "both"), max_steps=1)
    assert "r 12, lora_alpha 12" in said(capsys, "info", tmp_path / "run")


def test_the_loss_on_given_rows(capsys, runs, tmp_path):
    one, two = runs
    rows = rows_file(tmp_path / "rows.jsonl", range(20, 32))
    found = as_json(capsys, "combine", one, two, "--data", rows, "--output", tmp_path / "both")
    evaluation = found["evaluation"]
    assert isinstance(evaluation, dict)
    assert [adapter["name"] for adapter in evaluation["adapters"]] == ["both", "one", "two"]
    text = said(capsys, "combine", one, "--data", rows, "--output", tmp_path / "alone")
    assert "value" in text


def test_only_the_result_is_evaluated_if_the_others_cannot_be_loaded_beside_it(capsys, tmp_path):
    one, two = adapter_of(tmp_path / "one", 1), adapter_of(tmp_path / "two", 2, system="Be brief.")
    rows = rows_file(tmp_path / "rows.jsonl", range(20, 32))
    found = as_json(capsys, "combine", one, two, "--data", rows, "--output", tmp_path / "both")
    evaluation = found["evaluation"]
    assert isinstance(evaluation, dict)
    assert [adapter["name"] for adapter in evaluation["adapters"]] == ["both"]


def test_the_result_is_generated_with_and_served(capsys, runs, tmp_path):
    said(capsys, "combine", *runs, "--output", tmp_path / "served" / "both")
    answer = said(capsys, "generate", tmp_path / "served" / "both", HI, "--max-new-tokens", 8).rstrip("\n")
    with running(tmp_path / "served") as server:
        told = server.client().chat.completions.create(
            model="both", messages=[{"role": "user", "content": HI}], max_tokens=8, temperature=0
        )
    assert answer == (told.choices[0].message.content or "").rstrip("\n")


def test_wrong_options_are_refused_before_anything_is_read(capsys, tmp_path):
    out = ["--output", tmp_path / "out"]
    assert "ties requires --density" in refused(capsys, "combine", "x", "y", "--method", "ties", *out)
    assert "x=half: the weight after = must be a number" in refused(capsys, "combine", "x=half", "y", *out)
    assert "x: the folder does not exist" in refused(capsys, "combine", "x", *out)


def test_another_base_is_refused(capsys, runs, tmp_path):
    text = refused(capsys, "combine", *runs, "--model", model_folder("llama", 1), "--output", tmp_path / "out")
    assert "is not the base model that this adapter was trained on" in text
    assert not (tmp_path / "out").exists()


def test_weights(tmp_path):
    assert weighted("runs/one") == ("runs/one", 1.0)
    assert weighted("runs/a=b=-0.5") == ("runs/a=b", -0.5)
    (tmp_path / "r=8").mkdir()
    assert weighted(f"{tmp_path}/r=8") == (f"{tmp_path}/r=8", 1.0)
    assert weighted(f"{tmp_path}/r=8=2") == (f"{tmp_path}/r=8", 2.0)
    for word in ("x=0", "x=nan", "x=inf", "x="):
        with pytest.raises(ConfigError, match=r"must be a number other than 0, such as x=0\.5"):
            weighted(word)


def test_what_the_folder_records_is_json(capsys, runs, tmp_path):
    said(capsys, "combine", *runs, "--output", tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "lorasmith.json").read_text())["notes"]["combined"]
    assert [part["folder"] for part in notes["adapters"]] == [str(run / "adapter") for run in runs]
