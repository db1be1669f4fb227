"""What keeps the command from serving, each as one line; and adapters that are left out, with their reason."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorasmith.cli.main import main
from lorasmith.config.model import ModelConfig
from lorasmith.config.serving import ServeConfig
from lorasmith.errors import AdapterError
from lorasmith.lora.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasmith.report import Report
from lorasmith.serve.discovery import describe, discover
from lorasmith.serve.startup import open_manager
from tests.support import tiny


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`refused(*words)`: the problems that `lorasmith serve` ends with."""

    def refused(*words: object) -> list[str]:
        assert main(["serve", *map(str, words)]) == 2
        lines = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return refused


def test_a_file_of_keys_must_be_there_and_hold_one(runs: Path, tmp_path: Path, refused):
    (tmp_path / "empty").write_text("# nobody yet\n")
    assert refused(runs, "--keys", tmp_path / "none") == ["--keys none: cannot be read: No such file or directory"]
    assert refused(runs, "--keys", tmp_path / "empty") == [
        "--keys empty: contains no keys, so nobody could use the server."
    ]


def test_an_address_that_is_taken(runs: Path, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = refused(runs, "--port", port)
    assert line.startswith(
        f"127.0.0.1:{port}: cannot listen on this address: Address already in use. To use another port, "
    )


def test_nothing_to_serve(runs: Path, tmp_path: Path, refused):
    shutil.copytree(runs / "unfinished", tmp_path / "mine" / "unfinished")
    unfinished, why = refused(tmp_path / "mine", "--port", "0")
    assert unfinished.startswith("mine/unfinished: this run has not finished")
    assert why == "no adapter can be served, and no base model is given. Give one with --model."


def test_nothing_that_vllm_could_serve(runs: Path, tmp_path: Path, refused):
    for name in ("unfinished", "loud"):
        shutil.copytree(runs / name, tmp_path / "mine" / name)
    config = tmp_path / "mine" / "loud" / "adapter" / ADAPTER_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    unfinished, *refusals = refused(tmp_path / "mine", "--print-vllm")
    assert unfinished.startswith("skipped: mine/unfinished: ")
    assert refusals == ["vLLM cannot serve loud: use_dora is set", "no adapters are left that vLLM can serve."]


def test_the_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch, refused):
    monkeypatch.delitem(sys.modules, "lorasmith.serve.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert refused(runs) == ["lorasmith serve requires fastapi. Install it with: pip install 'lorasmith[serve]'"]


def test_adapters_that_break_the_answers_or_have_the_name_of_the_base_are_left_out(runs: Path, tmp_path: Path):
    base = tiny.model_folder()
    for name in ("torn", base.name, "loud"):
        shutil.copytree(runs / "loud", tmp_path / name)
    file = tmp_path / "torn" / "adapter" / ADAPTER_WEIGHTS
    save_file({key: weight * 1e30 for key, weight in load_file(file).items()}, file)
    model = ModelConfig(model=str(base), dtype="float32", device="cpu")
    discovery = discover([tmp_path])
    manager = open_manager(discovery, model, ServeConfig(), None, Report())
    assert manager.registry.names() == [base.name, "loud"]
    held = manager.registry.base.decoding.held
    assert [name.partition("@")[0] for name in held] == ["loud"]  # and none of the others is loaded
    assert sorted(text.replace(f"{tmp_path}/", "") for text in discovery.problems) == [
        f"{base.name!r} is the name of the base model. Choose another name for the adapter.",
        "torn/adapter: the adapter has no effect on the model's output, or makes it NaN or infinite.",
    ]


@pytest.mark.parametrize("name", ["loud", ""])
def test_a_name_that_is_taken_or_none_is_refused_before_anything_is_loaded(runs: Path, name: str):
    model = ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu")
    registry = open_manager(discover([runs / "loud"]), model, ServeConfig(), None, Report()).registry
    before = list(registry.base.decoding.held)
    with pytest.raises(AdapterError, match="cannot be the name of another adapter"):
        registry.put(describe(name, runs / "calm"))
    assert (list(registry.base.decoding.held), len(registry.names())) == (before, 2)
