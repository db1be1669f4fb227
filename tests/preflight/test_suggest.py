"""init: the file trains as it stands, every key has its line, and the values follow from the examples."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from lorasmith.config.toml import Config, load_config
from lorasmith.preflight import suggest as suggesting
from lorasmith.preflight.suggest import Suggestion, suggest
from tests.support.tiny import model_folder, row, rows_file


def found(path: Path, method: str = "lora", **data: object) -> Suggestion:
    sections = {"model": {"model": str(model_folder())}, "data": {"data": [str(path)], **data}}
    return suggest(load_config(None, {**sections, "training": {"method": method}}))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    rows_file(path, range(100))
    return path


def test_the_file_trains_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows_file(Path("rows.jsonl"), range(20))
    assert main(["init", "rows.jsonl", "--model", str(model_folder())]) == 0
    out = capsys.readouterr().out
    assert "20 rows: 20 chat;" in out
    assert out.splitlines()[-1] == "next: lorasmith train --config lorasmith.toml"
    assert main(["train", "--config", "lorasmith.toml", "--output", "run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text("utf-8"))
    assert summary["loss_after"] < summary["loss_before"]
    assert Path("run/samples.jsonl").is_file()


def test_every_key_has_its_line_and_reads_back(many):
    suggestion = found(many)
    text = suggestion.to_toml()
    lines = text.splitlines()
    keys = [line.split(" = ")[0] for line in lines if " = " in line and not line.startswith("#")]
    options = [key for part in tomllib.loads(text).values() for key in part]
    assert len(options) > 30
    assert keys == options
    for at, line in enumerate(lines):
        if line.split(" = ")[0] in options and not line.startswith("#"):
            assert lines[at - 1].startswith("# "), line
    assert Config.model_validate(tomllib.loads(text)) == suggestion.config


def test_what_the_user_said_stays(many):
    suggestion = found(many, max_length=100, held_out=7)
    assert (suggestion.config.data.max_length, suggestion.config.data.held_out) == (100, 7)
    assert "data.max_length" not in suggestion.reasons
    assert suggestion.config.data.too_long == "error"


def test_values_follow_from_the_rows(many, tmp_path):
    """Few rows: small steps, several passes, nothing held out where that would leave too little."""
    suggestion = found(many)
    data, training = suggestion.config.data, suggestion.config.training
    assert (data.held_out, data.too_long) == (10, "error")
    assert data.max_length % 64 == 0 or data.max_length == 128
    assert max(suggestion.summary.lengths) <= data.max_length < max(suggestion.summary.lengths) + 64
    assert (training.batch_size, training.epochs) == (8, 5)  # 12 steps a pass, 60 wanted
    rows_file(tmp_path / "few.jsonl", range(4))
    few = found(tmp_path / "few.jsonl").config
    assert (few.data.held_out, few.training.batch_size, few.training.eval_every) == (0, 2, 0)


def test_a_race_chooses_the_learning_rate_of_a_long_run(many, tmp_path):
    assert found(many).config.training.learning_rate == 1e-3
    rows_file(tmp_path / "long.jsonl", range(2300))
    suggestion = found(tmp_path / "long.jsonl")
    assert suggestion.config.training.learning_rate == "auto"
    assert suggestion.reasons["training.learning_rate"].endswith("steps are enough for a race of five")
    assert found(tmp_path / "long.jsonl", add_tokens=["<|call|>"]).config.training.learning_rate == 1e-3


def test_a_larger_model_and_full_fine_tuning_get_their_usual_rates(many, monkeypatch):
    assert found(many, method="full").config.training.learning_rate == 1e-4
    monkeypatch.setattr(suggesting, "weights_mib", lambda _folder, _dtype: 2000.0)  # 524 million numbers of 4 bytes
    large, full = found(many), found(many, method="full")
    assert (large.config.training.learning_rate, full.config.training.learning_rate) == (2e-4, 2e-5)
    assert large.reasons["training.learning_rate"] == "the usual value for this method"


@pytest.mark.parametrize(("long", "policy"), [(1, "drop"), (10, "truncate")])
def test_rows_that_do_not_fit(tmp_path, long, policy):
    """The base holds 128 tokens; what becomes of longer rows depends on how many there are."""
    path = tmp_path / "rows.jsonl"
    rows_file(path, range(40))
    with path.open("a", encoding="utf-8") as file:
        for i in range(long):
            messages = row(i)["messages"]
            file.write(json.dumps({"messages": [messages[0], {"role": "assistant", "content": "long " * 90}]}) + "\n")
    suggestion = found(path)
    assert (suggestion.config.data.max_length, suggestion.config.data.too_long) == (128, policy)
    assert f"{long} rows" in suggestion.reasons["data.too_long"]


def test_the_weights_are_not_read(many, tmp_path):
    folder = Path(shutil.copytree(model_folder(), tmp_path / "base"))
    (folder / "model.safetensors").write_bytes(b"broken")
    config = load_config(None, {"model": {"model": str(folder)}, "data": {"data": [str(many)]}})
    assert suggest(config).summary.limit == 128
