"""docs/pains.md and its Chinese twin: every test that they name exists; the pains that no other test makes happen."""

import ast
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.cli.main import main
from lorasmith.model.row import Step
from lorasmith.preflight import dry_run
from tests.support.paths import ROOT
from tests.support.tiny import flags, model_folder, row, rows_file, settings, tokenizer, trained

PAGES = ("pains.md", "pains.zh.md")
PAINS = [1, 2, 3, 4, 5, 6, 7, 11, 13, 15, 16, 17, 19, 20]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
Capture = pytest.CaptureFixture[str]


def parts(name: str) -> dict[int, str]:
    """The text under each pain's number."""
    text = (ROOT / "docs" / name).read_text("utf-8")
    found = re.split(r"^## (\d+)\. ", text, flags=re.MULTILINE)[1:]
    return {int(number): body for number, body in zip(found[::2], found[1::2], strict=True)}


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_page_names_exists(name: str) -> None:
    found = parts(name)
    assert list(found) == PAINS
    for number, body in found.items():
        named = TEST.findall(body)
        assert named, number
        assert len(named) == body.count("::"), number
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, test)


def test_both_languages_list_the_same_pains_and_tests() -> None:
    english, chinese = ({number: TEST.findall(body) for number, body in parts(name).items()} for name in PAGES)
    assert english == chinese
    codes = [re.findall(r"`(--?[a-z][\w-]*)`", (ROOT / "docs" / name).read_text("utf-8")) for name in PAGES]
    assert sorted(codes[0]) == sorted(codes[1])
    here = ast.parse(Path(__file__).read_text("utf-8")).body
    own = {node.name for node in here if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    named = {test for tests in english.values() for file, test in tests if file == "tests/docs/test_pains.py"}
    assert named == {name for name in own if "languages" not in name and "page" not in name}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pains") / "run"
    trained(folder)
    return folder


def test_a_tuned_model_stops_where_pad_is_eos(tmp_path: Path, capsys: Capture) -> None:
    """The rows end with the very token that fills short rows up: whoever masks by its id never teaches to stop."""
    assert tokenizer("bloom").pad_token_id == tokenizer("bloom").eos_token_id
    said = {"instruction": "Say something short.", "output": "No."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(said) + "\n") * 4, "utf-8")
    options = settings(model=str(model_folder("bloom")), held_out=0, max_steps=40, schedule="constant")
    assert main(["train", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run"), *flags(options)]) == 0
    capsys.readouterr()
    words = ["generate", str(tmp_path / "run"), said["instruction"], "--max-new-tokens", "30", "--json"]
    assert main([*words, "--temperature", "0"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["reply"].strip(), answer["finish"]) == ("No.", "stop")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda key, value: {key.replace("base_model.model.model.", "base_model.model.decoder."): value},
            "this base model has no modules for",
        ),
        (lambda key, value: {} if "layers.0" in key else {key: value}, "It lacks"),
        (lambda key, value: {key: value * 0 if "lora_B" in key else value}, "so the adapter changes nothing"),
    ],
    ids=["other prefix", "a layer missing", "B all zero"],
)
def test_an_adapter_that_would_not_arrive_is_refused(
    run: Path, tmp_path: Path, capsys: Capture, change: Any, text: str
) -> None:
    """Where the names do not fit, other tools answer with the base model's words."""
    copy = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    file, changed = copy / "adapter_model.safetensors", dict[str, torch.Tensor]()
    for key, value in load_file(file).items():
        changed |= change(key, value)
    save_file(changed, file)
    assert main(["generate", str(copy), "Hi"]) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert out == ""


def test_an_expression_in_a_list_and_an_invented_name_are_refused(tmp_path: Path, capsys: Capture) -> None:
    """On Bloom a list with an expression in it once trained less than was asked for, without a word."""
    options = flags(settings(model=str(model_folder("bloom"))))
    words = ["train", rows_file(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run"), *options]
    for wrong, text in (
        (r".*\.1\.self_attention\.query_key_value", "is not a module name, and a list may only contain names"),
        ("query_key_valeu", "matches no module"),
    ):
        assert main([*words, "--target-modules", "dense", wrong]) == 2
        err = capsys.readouterr().err
        assert repr(wrong) in err
        assert text in err
    assert "Did you mean 'query_key_value'?" in err
    assert not (tmp_path / "run").exists()


def test_the_longest_row_an_evaluation_and_a_save_come_before_the_first_step(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long row among short ones: a training would meet it after hours."""
    rows = [row(i) for i in range(12)]
    rows[7]["messages"][1]["content"] = "No. " * 14  # type: ignore[index]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(20, 23)), "utf-8")
    seen: list[Any] = []

    def spied(name: str) -> Any:
        right = getattr(dry_run, name)

        def spy(*args: Any, **more: Any) -> Any:
            seen.append((name, args))
            return right(*args, **more)

        return spy

    for name in ("train_step", "evaluate_loss", "_save"):
        monkeypatch.setattr(dry_run, name, spied(name))
    options = settings(held_out=str(tmp_path / "held.jsonl"), batch_size=1, max_steps=12)
    assert main(["check", str(tmp_path / "rows.jsonl"), *flags(options)]) == 0
    assert "MiB (measured in a dry run)" in " ".join(capsys.readouterr().out.split())
    assert [name for name, _args in seen if name != "train_step"] == ["evaluate_loss", "_save"]
    steps: list[Step] = [args[3] for name, args in seen if name == "train_step"]
    lengths = [step.rows[0].tokens for step in steps]
    assert lengths[0] == max(lengths) > 75


def test_nothing_asks_the_network_where_all_is_on_disk(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*words: object, **_more: object) -> None:
        asked.append(words)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    files, run, merged = rows_file(tmp_path / "rows.jsonl"), str(tmp_path / "run"), str(tmp_path / "merged")
    for words in (
        ["check", files, *flags(settings())],
        ["train", files, "--output", run, *flags(settings())],
        ["eval", run],
        ["generate", run, "Hi", "--max-new-tokens", "3"],
        ["merge", run, "--output", merged],
    ):
        assert main(words) == 0, capsys.readouterr().err
    assert asked == []
    assert main(["check", "org/name", *flags(settings())]) == 2
    assert asked, "a question would not have been noticed"
