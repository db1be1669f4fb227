"""Errors that other tests come past: each met on the command line, under its whole text."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorasmith.adapters.folder import NAME
from lorasmith.cli.main import main
from lorasmith.errors import Interrupted
from lorasmith.lora.adapter_config import ADAPTER_CONFIG
from lorasmith.training.run_files import STATE, TENSORS
from tests.support.tiny import Watch, flags, rows_file, settings, trained

Words = list[str]
TRAIN = flags(settings())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs 'done', 'other' (of another template) and 'stopped' (with a checkpoint)."""

    def stop(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path_factory.mktemp("rare")
    trained(folder / "done", max_steps=1)
    trained(folder / "other", max_steps=1, template="human-assistant")
    with pytest.raises(Interrupted):
        trained(folder / "stopped", Watch(stop))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, for one test, as the working directory."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def write(name: str, content: str | bytes) -> str:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def toml(text: str) -> Words:
    return ["train", rows_file(Path("rows.jsonl")), "--config", write("my.toml", text), "--output", "new", *TRAIN]


def resume() -> Words:
    return ["train", "--output", "stopped", "--resume"]


def checkpoint() -> Path:
    (folder,) = Path("stopped/checkpoints").glob("step-*")
    return folder


def without_base() -> Words:
    (Path("done/adapter") / NAME).unlink()
    change(Path("done/adapter") / ADAPTER_CONFIG, base_model_name_or_path=None)
    return ["generate", "done", "hi"]


def rank_0() -> Words:
    change(Path("done/adapter") / ADAPTER_CONFIG, r=0)
    return ["generate", "done", "hi"]


def without_a_key() -> Words:
    file = Path("done/adapter") / NAME
    about = json.loads(file.read_text("utf-8"))
    del about["template"]["stop"]
    write(str(file), json.dumps(about))
    return ["info", "done"]


def of_another_version() -> Words:
    change(checkpoint() / STATE, version=0)
    return resume()


def without_its_step() -> Words:
    write(str(checkpoint() / STATE), '{"version": 1}')
    return resume()


def of_another_size() -> Words:
    file = checkpoint() / TENSORS
    save_file({name: tensor[1:].clone() for name, tensor in load_file(file).items()}, file)
    return resume()


def only_calls() -> Words:
    call = {"function": {"name": "weather", "arguments": {}}}
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}
    return ["train", write("calls.jsonl", json.dumps({"messages": [question, answer]})), *TRAIN]


def row(**fields: object) -> Words:
    return ["train", write("row.jsonl", json.dumps(fields)), *TRAIN]


def detailed(details: object) -> Words:
    answer = {"role": "assistant", "content": "Hello", "train_detail": details}
    return row(messages=[{"role": "user", "content": "Hi"}, answer])


CASES: dict[str, tuple[Callable[[], Words], str]] = {
    "no base named": (without_base, "done/adapter: the adapter does not name its base model. Specify it with --model."),
    "rank 0 in a file": (rank_0, "adapter_config.json: r: invalid value 0: must be greater than 0"),
    "half of a file": (without_a_key, "done/adapter/lorasmith.json: template.stop: required key is missing."),
    "name too long": (lambda: ["train", rows_file(Path("rows.jsonl")), "--output", "a" * 300], ": File name too long"),
    "two templates": (
        lambda: ["eval", "done", "other"],
        "done and other were trained with different templates. Load each of them separately.",
    ),
    "empty prompt": (
        lambda: ["generate", "done", " "],
        "the prompt is empty: give one after RUN, with --file, or on standard input",
    ),
    "prompts not in UTF-8": (
        lambda: ["generate", "done", "--file", write("my.txt", b"hi\xff")],
        "--file: my.txt: byte 2 is not valid UTF-8. Save the file as UTF-8.",
    ),
    "init into a folder": (
        lambda: ["init", rows_file(Path("rows.jsonl")), "--output", "done"],
        "--output: done is a folder; name a file in it.",
    ),
    "picture nowhere": (
        lambda: ["plot", "done", "--output", "none/loss.png"],
        "--output: the folder none does not exist. Create it first.",
    ),
    "metrics of another tool": (
        lambda: ["plot", str(Path(write("done/metrics.jsonl", '{"step": "a", "loss": 1}\n')).parent)],
        "done/metrics.jsonl: not a valid metrics file: invalid literal for int() with base 10: 'a'",
    ),
    "empty name": (lambda: toml("[lora]\ntarget_modules = ['q_proj', '']"), "lora.target_modules: a name is empty"),
    "rank 0 for some": (
        lambda: toml("[lora]\nrank_pattern = {q_proj = 0}"),
        "lora: the values of rank_pattern and alpha_pattern must be greater than 0",
    ),
    "empty sample": (
        lambda: toml("[training]\nsamples = ['hi', ' ']"),
        "training.samples: prompt 2 is empty; write a prompt or remove it",
    ),
    "metric in no Python file": (
        lambda: ["eval", "done", "--generate", "1", "--metric", write("my.txt", "") + ":score"],
        "--metric my.txt:score: my.txt is not a Python file; its name must end in .py",
    ),
    "nested too deeply": (
        lambda: ["train", write("deep.jsonl", '{"prompt": "a", "completion": "b"}\n' + "[" * 10**5), *TRAIN],
        "data.data: deep.jsonl line 2: not valid JSON: nested too deeply.",
    ),
    "folder that datasets cannot read": (
        lambda: ["train", str(Path(write("done/state.json", "{}")).parent), *TRAIN],
        "data.data: done: `datasets` cannot read it: ",
    ),
    "calls that nobody shows": (
        only_calls,
        "calls.jsonl line 1: the template does not show 'tool_calls', so the model would never see them. Use a ",
    ),
    "parts that are no list": (
        lambda: detailed(5),
        "'train_detail' must be a list of parts of the text, each like ",
    ),
    "parts beyond the text": (
        lambda: detailed([{"begin_offset": 0, "end_offset": 99, "train": False}]),
        "'train_detail': part 1 is from 0 to 99, but the text has the characters 0 to 4.",
    ),
    "KTO": (
        lambda: row(prompt="Hi", completion="Go away", label=False),
        "this row has 'label': false, which marks a good or a bad answer. Training on",
    ),
    "steps and labels": (
        lambda: row(prompt="2+2?", completions=["2+2", "4"], labels=[True, True]),
        "this row has steps and their labels ('completions', 'labels'), for a process reward model.",
    ),
    "texts to contrast": (
        lambda: row(query="cats", pos=["a cat"], neg=["a dog"]),
        "this row has positive and negative texts, for training an embedding model.",
    ),
    "checkpoint of another version": (
        of_another_version,
        "state.json: written by another version (0); this version of lorasmith reads 1, 2.",
    ),
    "checkpoint with half of its state": (without_its_step, "state.json: cannot be read: "),
    "checkpoint of another size": (of_another_size, "the saved adapter does not have the size of the configured one."),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_line_and_exit_code_2(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, text = CASES[name]
    words = make()
    capsys.readouterr()
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert text in line
