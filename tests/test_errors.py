"""Bad input on the command line: exit code 2, one clear message, no traceback, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith import errors
from lorasmith.adapters.session import open_adapters
from lorasmith.cli.main import main
from lorasmith.config.model import ModelConfig
from lorasmith.errors import AdapterError, LorasmithError, first_line
from tests.support.tiny import flags, model_folder, row, rows_file, settings, trained

Words = list[str]


def lines(folder: Path, *texts: str) -> Words:
    (folder / "rows.jsonl").write_text("".join(text + "\n" for text in texts), "utf-8")
    return [str(folder / "rows.jsonl")]


def good(folder: Path) -> Words:
    return [rows_file(folder / "rows.jsonl")]


def without(folder: Path, *names: str) -> Words:
    """A copy of the model that lacks files."""
    copy = folder / "model"
    shutil.copytree(model_folder(), copy)
    for name in names:
        (copy / name).unlink()
    return [*good(folder), "--model", str(copy)]


def pickled(folder: Path) -> Words:
    words = without(folder)
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")
    return words


OK = json.dumps(row(1))
CASES: dict[str, tuple[Callable[[Path], Words], str]] = {
    "no data": (lambda d: [], "data.data: no training data is given. Give a JSON, JSONL, CSV or Parquet file."),
    "missing file": (lambda d: [str(d / "rows.json")], "rows.json does not exist"),
    "empty file": (lambda d: lines(d), "rows.jsonl"),
    "broken JSON": (lambda d: lines(d, OK, OK, '{"messages": [', OK), "rows.jsonl line 3"),
    "wrong columns": (lambda d: lines(d, '{"question": "?", "answer": "!"}'), "rows.jsonl line 1"),
    "nothing to learn": (lambda d: lines(d, OK, json.dumps({"messages": row(1)["messages"][:1]})), "rows.jsonl line 2"),
    "too long": (lambda d: [*good(d), "--max-length", "8"], "data.max_length"),
    "longer than the model": (lambda d: [*good(d), "--max-length", "4096"], "the model's context length of 128 tokens"),
    "held out too many": (lambda d: [*good(d), "--held-out", "12"], "data.held_out: holding out 12 of 12 rows"),
    "held out file missing": (lambda d: [*good(d), "--held-out", str(d / "none.jsonl")], "none.jsonl"),
    "pattern without a match": (lambda d: [*good(d), "--target-modules", "q_porj"], "Did you mean 'q_proj'?"),
    "no regular expression": (lambda d: [*good(d), "--target-modules", "(q_proj"], "lora.target_modules: '(q_proj'"),
    "r 0": (lambda d: [*good(d), "--r", "0"], "lora.r: invalid value '0': must be greater than 0"),
    "r no number": (lambda d: [*good(d), "--r", "eight"], "lora.r: invalid value 'eight': must be a whole number"),
    "unknown flag": (lambda d: [*good(d), "--learn-rate", "1"], "Did you mean '--learning-rate'?"),
    "no model": (lambda d: [*good(d), "--model", str(d / "nowhere")], "model.model: "),
    "no tokenizer": (lambda d: without(d, "tokenizer.json", "tokenizer_config.json"), "no tokenizer found"),
    "no config": (lambda d: without(d, "config.json"), "it does not contain config.json"),
    "no weights": (lambda d: without(d, "model.safetensors"), "no weights found (model.safetensors)"),
    "pickled weights": (pickled, "the weights are pickle files"),
    "no device": (lambda d: [*good(d), "--device", "toaster"], "model.device: unknown device 'toaster'"),
    "missing config": (lambda d: [*good(d), "--config", str(d / "none.toml")], "none.toml: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_exit_code_2_and_nothing_written(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    make, text = CASES[name]
    given = make(tmp_path)
    options = {key: value for key, value in settings().items() if f"--{key.replace('_', '-')}" not in given}
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *given, "--output", "runs/new", *flags(options)]) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")
    assert text in line
    assert sorted(tmp_path.rglob("*")) == before


def test_every_bad_row_is_named_at_once(tmp_path, capsys):
    files = lines(tmp_path, OK, '{"messages": []}', OK, '{"messages": [{"role": "user", "content": "Hi"}]}')
    assert main(["train", *files, "--output", str(tmp_path / "run"), *flags(settings())]) == 2
    err = capsys.readouterr().err
    assert "line 2" in err
    assert "line 4" in err
    assert not (tmp_path / "run").exists()


def test_every_wrong_option_is_named_at_once(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("[lora]\nr = 0\nrr = 3\n[training]\nclip = -1.0\n", "utf-8")
    assert main(["train", "--config", str(tmp_path / "run.toml"), *good(tmp_path), "--epochs", "0"]) == 2
    err = capsys.readouterr().err
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == [
        "lora.r", "lora.rr", "training.clip", "training.epochs",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors") / "run"
    trained(folder)
    return folder


def test_an_adapter_refuses_another_base(run):
    with pytest.raises(
        AdapterError, match=r"is not the base model that this adapter was trained on .*; they differ in: tensors\."
    ):
        open_adapters([run], ModelConfig(model=str(model_folder("llama", seed=5))))
    with pytest.raises(AdapterError, match=r"they differ in: config, tensors(, tokenizer)?\."):
        open_adapters([run], ModelConfig(model=str(model_folder("gpt2"))))
    assert open_adapters([run], ModelConfig(model=str(model_folder()))).names == ["run"]


def test_an_adapter_refuses_its_base_with_another_tokenizer(run, tmp_path):
    copy = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    text = (copy / "tokenizer.json").read_text("utf-8")
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(AdapterError, match=r"they differ in: tokenizer\."):
        open_adapters([run], ModelConfig(model=str(copy)))


def test_generate_says_it_on_the_command_line_too(run, capsys):
    assert main(["generate", str(run), "Hello", "--model", str(model_folder("llama", seed=5))]) == 2
    err = capsys.readouterr().err
    assert "is not the base model that this adapter was trained on" in err
    assert len(err.splitlines()) == 1
    assert main(["generate", str(run.parent / "none"), "Hello"]) == 2
    assert "the folder does not exist" in capsys.readouterr().err


def test_every_error_of_ours_leaves_with_2_and_is_drawn_in_the_docstring():
    tree = errors.__doc__ or ""
    subclasses = LorasmithError.__subclasses__()
    assert {LorasmithError, *subclasses} >= {errors.DataError, errors.RunError}
    for error in subclasses:
        if error.__module__ == errors.__name__:
            assert error.__name__ in tree
            assert error("a", "b").exit_code == 2
            assert str(error("a", "b")) == "a\nb"


def test_a_library_that_says_nothing_is_named_by_the_kind_of_its_error():
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(ValueError("\n  \nwhat\nmore")) == "what"
