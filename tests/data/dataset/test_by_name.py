"""NAME=FILE, and the files of a folder."""

import pytest

from lorasmith.data.dataset.by_name import files_by_name, named_by_file
from lorasmith.errors import ConfigError


def test_names_and_their_files():
    words = ("a=x.jsonl", "b=y.csv#500:0.7", "a=z.jsonl")
    assert files_by_name(words) == {"a": ("x.jsonl", "z.jsonl"), "b": ("y.csv#500:0.7",)}


@pytest.mark.parametrize("words", [("x.jsonl",), ("year/k=v/x.jsonl",), ("=x.jsonl",), ("a=",), ("org/name",), ()])
def test_plain_files_have_no_names(words):
    assert files_by_name(words) == {}


def test_a_file_of_this_name_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=x.jsonl").write_text("{}\n")
    assert files_by_name(("a=x.jsonl",)) == {}
    assert files_by_name(("a=x.jsonl#5:0.5",)) == {}
    assert files_by_name(("b=a=x.jsonl",)) == {"b": ("a=x.jsonl",)}


def test_all_files_have_names_or_none_has():
    with pytest.raises(ConfigError, match=r"^data.data: y.jsonl has no adapter's name, but other files do"):
        files_by_name(("a=x.jsonl", "y.jsonl"))


def test_files_of_a_folder(tmp_path):
    for name in ("shopB.jsonl.gz", "shopA.csv", "notes.md", "shopC.json"):
        (tmp_path / name).write_text("")
    found = [f"{name}={tmp_path / file}" for name, file in
             [("shopA", "shopA.csv"), ("shopB", "shopB.jsonl.gz"), ("shopC", "shopC.json")]]  # fmt: skip
    assert list(named_by_file([str(tmp_path)])) == found
    assert named_by_file(["x/shopD.jsonl#500"]) == ("shopD=x/shopD.jsonl#500",)


def test_a_folder_without_rows_and_two_files_of_one_name(tmp_path):
    with pytest.raises(ConfigError, match=r"contains no files of rows"):
        named_by_file([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"x/a.jsonl and y/a.csv would both be the adapter a\. Give them names"):
        named_by_file(["x/a.jsonl", "y/a.csv"])
