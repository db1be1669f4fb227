"""NAME=FILE, and the files of a folder."""

import pytest

from lorasmith.config.toml import load_config
from lorasmith.data.dataset.by_name import configs_by_name, files_by_name, named_by_file, with_names
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


def test_the_options_of_each_adapter(tmp_path):
    (tmp_path / "b.csv").write_text("")
    whole = load_config(None, {"data": {"data": [str(tmp_path)], "held_out": 3.0}})
    assert configs_by_name(whole) == {}
    named = with_names(whole)
    assert with_names(named) is named
    found = configs_by_name(named, tmp_path / "out")
    assert [*found] == ["b"]
    assert found["b"].data.data == (str(tmp_path / "b.csv"),)
    assert (found["b"].output, found["b"].data.held_out) == (str(tmp_path / "out" / "b"), 3.0)
    assert configs_by_name(named)["b"].output is None
