"""Data sets by the names of hubs: what is asked, and what is said where they cannot be had. No network is used."""

import sys
from types import SimpleNamespace

import pytest

from lorasmith.data.hub import is_hub_name
from lorasmith.data.read.files import ROW_FILES, read_file
from lorasmith.errors import DataError, MissingExtraError
from lorasmith.report import Report

datasets = pytest.importorskip("datasets", reason="the extra lorasmith[data] is not installed")
ROW = {"instruction": "Ask", "output": "Answer"}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An empty folder, and a hub that nobody answers for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [("org/name", True), ("org/name-v1.5", True), ("org/name:main", True), ("modelscope:org/name", True),
     ("hf:here/name", True), ("here/name", False), ("org/name.jsonl", False), ("name", False), ("/org/name", False),
     ("./org/name", False), ("a/b/c", False), ("s3:org/name", False)],
)  # fmt: skip
def test_which_names_are_a_hubs(tmp_path, name, is_hub):
    (tmp_path / "here").mkdir()
    assert is_hub_name(name, ROW_FILES) == is_hub


def test_without_network_one_line_says_what_was_tried_and_how_to_go_on():
    with pytest.raises(DataError) as caught:
        read_file("org/name")
    (text,) = caught.value.problems
    assert "\n" not in text
    assert text.startswith(
        "data.data: org/name does not exist here and could not be downloaded as a dataset from https://huggingface.co ("
    )
    assert "HF_HUB_OFFLINE" in text
    assert text.endswith("To use a mirror, set HF_ENDPOINT.")


def test_what_is_fetched_is_said_and_the_split_train_is_read(monkeypatch):
    asked, said = [], []
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list([]), "train": datasets.Dataset.from_list([ROW])})
    info = SimpleNamespace(id="org/name", card_data={"license": "mit"}, siblings=[SimpleNamespace(size=1_500_000)])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **_options: info)
    monkeypatch.setattr("datasets.load_dataset", lambda *words: asked.append(words) or splits)
    report = Report()
    report.say = said.append
    found = read_file("org/name:main", report=report)
    assert [(r.fields, r.source) for r in found.records] == [(ROW, "org/name:main row 1")]
    assert asked == [("org/name", "main")]
    assert said == [
        "Dataset org/name on https://huggingface.co: 1.5 MB, license mit; downloaded unless it is already in the cache."
    ]
    del splits["train"]
    splits["dev"] = splits["test"]
    with pytest.raises(DataError, match="org/name has no split 'train', only 'test', 'dev'"):
        read_file("org/name")


def test_modelscope(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[modelscope\]'"):
        read_file("modelscope:org/name")
    folder = tmp_path / "fetched"
    folder.mkdir()
    (folder / "train.csv").write_text("instruction,output\nAsk,Answer\n")

    def fetch(name):
        if name == "org/name":
            return str(folder)
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(dataset_snapshot_download=fetch))
    found = read_file("modelscope:org/name")
    assert [(r.fields, r.source) for r in found.records] == [(ROW, "modelscope:org/name row 1")]
    with pytest.raises(
        DataError, match=r"could not be downloaded as a dataset from https://modelscope\.cn \(no route\)"
    ):
        read_file("modelscope:org/other")
