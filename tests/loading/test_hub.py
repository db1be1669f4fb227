"""A base by its name on a hub: from the client's cache without a word, else one line that says what was tried."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from lorasmith.cli.main import main
from lorasmith.errors import MissingExtraError, ModelError
from lorasmith.loading.folder import find_folder
from lorasmith.loading.hub import is_hub_name
from lorasmith.report import Report
from tests.support.tiny import model_folder, rows_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's cache with one model in it, and no network."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    for file in model_folder().iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return snapshot


def test_what_is_in_the_cache_is_used_without_network(cache: Path) -> None:
    assert find_folder("org/tiny", Report()) == cache
    assert find_folder("hf:org/tiny", Report()) == cache


def test_without_network_one_line_says_what_was_tried(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file(tmp_path / "rows.jsonl", range(4))
    assert main(["train", str(tmp_path / "rows.jsonl"), "--model", "org/other", "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: model.model: 'org/other' is not a folder or GGUF file on this machine, and it could not "
        "be downloaded as a model from "
    )
    assert "HF_ENDPOINT" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_missing_is_no_name_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert not is_hub_name("models/mine")
    assert not is_hub_name("./models/mine")
    assert not is_hub_name("a/b/c")
    assert is_hub_name("org/mine")
    with pytest.raises(ModelError, match="not a folder or GGUF file on this machine"):
        find_folder("models/mine", Report())


def test_modelscope_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(MissingExtraError, match=r"lorasmith\[modelscope\]"):
        find_folder("modelscope:org/tiny", Report())
