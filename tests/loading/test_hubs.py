"""Bases and data sets of a hub through its real client, from a hub on this machine: no other network is used."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.errors import DataError, ModelError
from tests.support.hub_server import SHA, Hub, hub_of
from tests.support.tiny import Watch, metrics, model_folder, rows_file

pytest.importorskip("datasets", reason="the extra lorasmith[data] is not installed")
BROKEN = r"\((peer closed connection|.*[Cc]onnection reset|.*disconnected)"  # what the client says depends on the load
FEW = ("--max-steps", "2", "--held-out", "3", "--dtype", "float32")
TINY = {file.name: file.read_bytes() for file in model_folder().iterdir()}
# What no training needs, as most repositories have: the cache is whole without it.
EXTRA = {"README.md": b"---\nlicense: apache-2.0\n---\nA model.", "pytorch_model.bin": b"pickled"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Answers until the test ends, or until `hub.shutdown()`."""
    rows = Path(rows_file(tmp_path / "rows.jsonl")).read_bytes()
    repositories = {
        "models/org/tiny": TINY | EXTRA,
        "models/org/gated": TINY,
        "datasets/org/MyRows": {"train.jsonl": rows, "README.md": b"---\nlicense: mit\n---\nRows."},
        "datasets/org/gated": {"train.jsonl": rows},
    }
    with hub_of(repositories) as made:
        yield made


@pytest.fixture
def asked_here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub that this process asks, with an empty cache, and no second between what is tried again."""
    for name, value in {
        "huggingface_hub.constants.ENDPOINT": hub.url,
        "huggingface_hub.constants.HF_HUB_CACHE": str(tmp_path / "hub"),
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "datasets.config.HF_ENDPOINT": hub.url,
        "datasets.config.HF_DATASETS_CACHE": tmp_path / "datasets",
        "huggingface_hub.file_download.time.sleep": lambda _seconds: None,
    }.items():
        monkeypatch.setattr(name, value)
    return hub


def lorasmith(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, with a cache that is empty at first."""
    script = "import sys; from lorasmith.cli.main import main; sys.exit(main(sys.argv[1:]))"
    own = {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "NO_PROXY": "*"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, env=kept | own | variables, cwd=folder, capture_output=True, text=True, timeout=120)


def test_base_and_rows_are_fetched_once_and_then_needed_no_more(hub: Hub, tmp_path: Path) -> None:
    command = ("train", "org/MyRows", "--model", "org/tiny", *FEW, "--output")
    first = lorasmith(tmp_path, *command, "first", HF_ENDPOINT=hub.url)
    assert first.returncode == 0, first.stderr
    said = first.stdout.splitlines()
    assert (
        said[0]
        == f"Dataset org/MyRows on {hub.url}: 0.0 MB, license apache-2.0; downloaded unless it is already in the cache."
    )
    assert said[1] == f"Model org/tiny on {hub.url}: 0 MB of weights, license apache-2.0; downloaded once."
    assert said[-2:] == ["Finished. The adapter is in first/adapter", "next: lorasmith chat first"]
    assert [line for line in said if line.startswith("downloading")][-1] == "downloading org/tiny 1/1"
    assert "Fetching" not in first.stderr
    fetched = {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /org/tiny/resolve/")}
    assert fetched == TINY.keys()

    hub.asked.clear()
    hub.shutdown()
    hub.server_close()
    for run, variables in (("second", {}), ("third", {"HF_HUB_OFFLINE": "1"})):
        again = lorasmith(tmp_path, *command, run, HF_ENDPOINT=hub.url, **variables)
        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith(
            "org/MyRows: using the cached copy, because the hub could not be reached or refused the request ("
        )
        assert again.stderr == ""
        assert metrics(tmp_path / run) == metrics(tmp_path / "first")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hidden", "it does not exist, or it is private and HF_TOKEN gives no access to it"),
        ("missing", "it does not exist, or it is private and HF_TOKEN gives no access to it"),
        ("gated", "access is restricted: request access at {url}/org/gated, then set HF_TOKEN"),
    ],
)
def test_what_a_hub_refuses_is_told_in_a_line(asked_here: Hub, name: str, why: str) -> None:
    from lorasmith.data.read.files import read_file
    from lorasmith.loading.folder import find_folder

    with pytest.raises(ModelError) as caught:
        find_folder(f"org/{name}", Watch())
    (text,) = caught.value.problems
    assert f"could not be downloaded as a model from {asked_here.url} ({why.format(url=asked_here.url)})" in text
    with pytest.raises(DataError) as found:
        read_file(f"org/{name}")
    (text,) = found.value.problems
    assert f"could not be downloaded as a dataset from {asked_here.url} (" in text
    assert ("gated dataset" if name == "gated" else why) in text


def test_a_broken_download_is_told_in_a_line_and_leaves_no_half_of_anything(
    asked_here: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lorasmith.data.read.files import read_file
    from lorasmith.loading.folder import find_folder

    asked_here.broken |= {"tokenizer.json", "train.jsonl"}
    for _again in range(2):  # the second one must not take what came of the first for a whole model
        with pytest.raises(ModelError) as caught:
            find_folder("org/tiny", Watch())
        (text,) = caught.value.problems
        assert f"could not be downloaded as a model from {asked_here.url} (" in text
        assert re.search(BROKEN, text), text
    with pytest.raises(DataError, match=rf"could not be downloaded as a dataset from .*{BROKEN}"):
        read_file("org/MyRows")
    assert capfd.readouterr().err == ""
    assert not [path for path in tmp_path.rglob("*") if path.name in asked_here.broken]

    asked_here.broken.clear()
    report = Watch()
    folder = find_folder("org/tiny", report)
    assert folder.name == SHA
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == TINY
    assert report.tasks[-1] == "downloading org/tiny"
    assert len(read_file("org/MyRows").records) == 12
