"""init as it is typed: the file it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from lorasmith.cli.main import main
from lorasmith.config.toml import load_config
from tests.support.migrating import AXOLOTL
from tests.support.tiny import model_folder, rows_file


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    rows_file(path, range(100))
    return path


def test_an_existing_file_is_never_overwritten_unasked(many, tmp_path, capsys):
    target = tmp_path / "own.toml"
    target.write_text("mine", "utf-8")
    words = ["init", str(many), "--model", str(model_folder()), "--output", str(target)]
    assert main(words) == 2
    assert "already exists. Replace it with --overwrite" in capsys.readouterr().err
    assert target.read_text("utf-8") == "mine"
    assert main([*words, "--overwrite", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["rows"], line["limit"], line["file"]) == (100, 128, str(target))


def test_every_bad_row_is_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": ""}\n{"question": "b"}\n', "utf-8")
    assert main(["init", str(path), "--model", str(model_folder()), "--output", str(tmp_path / "x.toml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) >= 2
    assert not (tmp_path / "x.toml").exists()


def test_columns_of_other_names_and_weights_are_kept(tmp_path, capsys):
    (tmp_path / "own.csv").write_text(
        "question,answer\n" + "".join(f"What is {i}?,It is {i}.\n" for i in range(9)), "utf-8"
    )
    target = tmp_path / "own.toml"
    words = [f"{tmp_path / 'own.csv'}:0.5", "--map", "instruction=question", "output=answer"]
    assert main(["init", *words, "--model", str(model_folder()), "--output", str(target)]) == 0
    data = load_config(target, {}).data
    assert data.map == {"instruction": "question", "output": "answer"}
    assert data.data[0].endswith("own.csv:0.5")
    assert "9 rows: 9 alpaca;" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("output", "words"), [(".", "is a folder; name a file in it"), ("no/file.toml", "the folder no does not exist")]
)
def test_a_file_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, monkeypatch, capsys, output, words):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "no-such-data.jsonl", "--output", output]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "no-such-data" not in error


def test_a_file_of_another_program_is_converted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(AXOLOTL + "foo: 1\nbf16: auto\n", "utf-8")
    assert main(["init", "--from", "theirs.yaml", "--max-length", "99"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        "Converted from theirs.yaml (Axolotl).",
        "  Not taken over: foo: 1: lorasmith has no such option.",
    ]
    assert out[-1] == "next: lorasmith check --config lorasmith.toml"
    config = load_config(tmp_path / "lorasmith.toml", {})
    assert (config.lora.r, config.data.max_length, config.data.data) == (16, 99, ("org/rows",))
    assert main(["init", "--from", "theirs.yaml"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["init", "mine.jsonl", "--from", "theirs.yaml", "--overwrite", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["program"], line["not_taken_over"]) == ("Axolotl", {"foo: 1": "lorasmith has no such option."})
    assert line["taken_over"]["lora.r"] == "from lora_r"
    assert load_config(tmp_path / "lorasmith.toml", {}).data.data == ("mine.jsonl",)


def test_a_file_that_cannot_be_converted_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text(AXOLOTL + "qat: true\n", "utf-8")
    assert main(["init", "--from", "theirs.yaml"]) == 2
    assert "qat: true: lorasmith quantizes a base model to NF4 or int8" in capsys.readouterr().err
    assert not (tmp_path / "lorasmith.toml").exists()


def test_a_converted_file_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_file(Path("rows.jsonl"), range(20))
    (tmp_path / "theirs.yaml").write_text(AXOLOTL.replace("org/rows", "rows.jsonl") + "micro_batch_size: 4\n", "utf-8")
    words = ["--model", str(model_folder()), "--max-length", "100"]
    assert main(["init", "--from", "theirs.yaml", *words]) == 0
    assert main(["train", "--config", "lorasmith.toml", "--output", "run", "--max-steps", "2"]) == 0
    assert Path("run/summary.json").is_file()
