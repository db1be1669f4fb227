"""Compressed files, the progress of large ones, and optional packages."""

import gzip
import json
import re

import pytest

from lorasmith.data.read.files import read_file, read_records
from lorasmith.data.read.stream import Source, open_source
from lorasmith.errors import DataError, MissingExtraError
from lorasmith.report import Report
from tests.support.row_files import OTHER, ROW, problems


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.csv", ".csv"), ("a.CSV.gz", ".csv"), ("b/a.json.zst", ".json"), ("a.gz", ""), ("a.tar.bz2", ".bz2")],
)
def test_the_suffix_is_that_of_the_decompressed_file(name, suffix):
    assert Source(name, "data.data", Report()).suffix == suffix


def test_a_missing_package_is_named_with_its_extra():
    source = Source("a.parquet", "data.held_out", Report())
    with pytest.raises(MissingExtraError) as caught:
        source.import_package("no_such_package.inner", "hub")
    assert str(caught.value) == (
        "data.held_out: a.parquet requires the package no_such_package. Install it with: pip install 'lorasmith[hub]'"
    )


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "none.jsonl"
    error = pytest.raises(DataError, match=re.escape(f"data.data: {path}: cannot be read: No such file"))
    with error, open_source(Source(str(path), "data.data", Report())) as file:
        file.read()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.GZ"])
def test_packed_files(write, name):
    content = (
        json.dumps([ROW, OTHER] * 9).encode()
        if ".json." in name
        else "\n".join(map(json.dumps, [ROW, OTHER] * 9)).encode()
    )
    path = write(name, packed(name, content))
    assert [record.fields for record in read_records(path)] == [ROW, OTHER] * 9
    path = write(f"cut-{name}", packed(name, content)[:-6])
    assert problems(path)[0].startswith(f"data.data: cut-{name}: cannot be read: ")
    assert problems(write(f"bad-{name}", b"no packed file"))[0].startswith(f"data.data: bad-{name}: cannot be read: ")


def packed(name: str, content: bytes) -> bytes:
    if name.lower().endswith(".gz"):
        return gzip.compress(content)
    pyarrow = pytest.importorskip("pyarrow", reason="the extra lorasmith[data] is not installed")
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def test_a_large_file_shows_its_progress(write, monkeypatch):
    monkeypatch.setattr("lorasmith.data.read.stream.LARGE", 1)
    path, steps = write("a.jsonl", [ROW]), []
    report = Report()
    report.progress = lambda task, done, total: steps.append((task, done, total))
    read_file(path, report=report)
    assert steps[-1] == ("reading a.jsonl", path.stat().st_size, path.stat().st_size)
