"""`train` as it is typed."""

import json
import shutil

import pytest

from lorasmith.cli.main import main
from tests.support.commands import refused
from tests.support.tiny import adapter_bytes, flags, model_folder, rows_file, settings


def test_the_summary_as_json(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", rows_file(tmp_path / "rows.jsonl"), "--output", str(run), "--json", *flags(settings())]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert json.loads(line) == json.loads((run / "summary.json").read_text("utf-8"))
    assert f"next: lorasmith chat {run}" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--overwrite", "--output", "run"], "--resume continues a run and --overwrite replaces it"),
        (["--resume"], "--resume: specify the run to resume with --output RUN"),
    ],
)
def test_flags_that_contradict_each_other(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "train", *words)


def test_train_says_which_base_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lorasmith.loading.folder.packaged_model", lambda _name, _report: model_folder())
    options = settings()
    options.pop("model")
    assert main(["train", rows_file(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run"), *flags(options)]) == 0
    out = capsys.readouterr().out
    assert "No base model given; using smollm2-135m-instruct" in out
    assert "Choose another one with --model" in out
    assert 'model = "smollm2-135m-instruct"' in (tmp_path / "run" / "config.toml").read_text("utf-8")
    assert main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert "No base model" not in capsys.readouterr().out


def test_an_adapter_for_each_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shops").mkdir()
    rows_file(tmp_path / "shops" / "shopA.jsonl")
    rows_file(tmp_path / "shops" / "shopB.jsonl", range(6, 18))
    assert main(["train", "shops", "--each", "--output", "runs/all", *flags(settings())]) == 0
    out = capsys.readouterr().out
    assert "Training 2 adapters at once" in out
    assert "next: lorasmith chat runs/all/shopA" in out
    words = ["train", "--data", "a=shops/shopA.jsonl", "b=shops/shopB.jsonl", "--output", "runs/named", "--json"]
    assert main([*words, *flags(settings())]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["a", "b"]
    for name, other in (("a", "shopA"), ("b", "shopB")):
        run = tmp_path / "runs" / "named" / name
        assert found[name] == json.loads((run / "summary.json").read_text("utf-8"))
        assert adapter_bytes(run) == adapter_bytes(tmp_path / "runs" / "all" / other)
    assert main(["train", "--output", "runs/named", "--resume"]) == 0
    assert capsys.readouterr().out.count("has already finished") == 2
    assert "is the run of one adapter" in refused(capsys, *words[:4], "--output", "runs/named/a", *flags(settings()))


def test_export_after_the_training(tmp_path, capsys):
    run, rows = tmp_path / "run", rows_file(tmp_path / "rows.jsonl")
    words = ["train", rows, "--output", str(run), "--export", "gguf", *flags(settings())]
    assert main(words) == 0
    assert f"Exported: {run}.gguf, with run.gguf.certificate.json" in capsys.readouterr().out
    shutil.rmtree(run)
    assert "run.gguf already exists" in refused(capsys, *words)
    assert not run.exists()
    assert "--export exports one adapter" in refused(capsys, "train", f"a={rows}", "--export", "gguf")


def test_what_cannot_be_exported_is_refused_before_the_training(tmp_path, capsys):
    rows, bloom = rows_file(tmp_path / "rows.jsonl"), settings(model=str(model_folder("bloom")))
    words = [rows, "--output", str(tmp_path / "run"), "--export", "gguf", *flags(bloom)]
    assert "Models of type bloom cannot be exported to GGUF yet" in refused(capsys, "train", *words)
    assert not (tmp_path / "run").exists()
    assert main(["check", *words]) == 2
    assert "Models of type bloom cannot be" in " ".join("".join(capsys.readouterr()).split())
    assert main(["check", rows, "--export", "ollama", *flags(settings())]) == 0
