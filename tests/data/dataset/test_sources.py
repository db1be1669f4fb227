"""What the words of data.data name: files, numbers of rows, weights; and which rows are sampled."""

import json

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.config.toml import load_config
from lorasmith.data.dataset.prepare import read_files
from lorasmith.data.dataset.sources import DataSource, parse_held_out, parse_sources, split_source
from lorasmith.errors import ConfigError, DataError
from lorasmith.report import Report
from lorasmith.training.run_folder import with_absolute_paths


def test_numbers_and_names_with_their_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl:0.7", "a.jsonl#5"):
        (tmp_path / name).write_text("")
    words = ["a.jsonl:0.7", "a.jsonl#5", "C:\\rows.csv", "org/name:main", "modelscope:org/name", "b#x.json", "c#"]
    assert parse_sources(words) == [DataSource(word) for word in words]
    assert parse_sources(["b.jsonl:7", "org/name:main#20:0.3", "folder#300:1"]) == [
        DataSource("b.jsonl", None, 7.0),
        DataSource("org/name:main", 20, 0.3),
        DataSource("folder", 300, 1.0),
    ]
    assert parse_sources(["b.jsonl#7"]) == [DataSource("b.jsonl", 7)]
    assert split_source("b.jsonl#7:0.5") == ("b.jsonl", "#7:0.5")
    assert parse_held_out("test.jsonl#7") == DataSource("test.jsonl", 7)


def test_numbers_that_cannot_be():
    with pytest.raises(ConfigError) as caught:
        parse_sources(["a:0", "b:nan", "c", "d:1", "d:2", "e:-1", "f#0:1"])
    assert caught.value.problems == (
        "data.data: a:0: the weight must be a number greater than 0.",
        "data.data: b:nan: the weight must be a number greater than 0.",
        "data.data: e:-1: the weight must be a number greater than 0.",
        "data.data: f#0:1: the number of rows must be at least 1.",
        "data.data: c has no weight, but other files do. Write c:WEIGHT, or remove all weights.",
        "data.data: d is given twice. Give it once, with one weight.",
    )
    with pytest.raises(ConfigError, match=r"^data\.held_out: test\.jsonl#0: the number of rows must be at least 1"):
        parse_held_out("test.jsonl#0")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(100)), "utf-8")
    return path


def numbers(*data: str, **options) -> list[list[int]]:
    """The rows of each file that are used, by their place in it."""
    files = read_files(DataConfig(data=data, **{"held_out": 0} | options), Report())
    return [[int(str(record.fields["text"]).split()[1]) for record in found.records] for found in files]


def test_some_rows_of_a_file_are_a_sample_in_its_order(file):
    (few,), (more,), (every,) = numbers(f"{file}#10"), numbers(f"{file}#50"), numbers(str(file))
    assert (len(few), len(more), every) == (10, 50, list(range(100)))
    assert few == sorted(few) != list(range(10))
    assert set(few) < set(more)
    assert numbers(f"{file}#10") == [few], "the same in every run"
    assert numbers(f"{file}#100") == [every]


def test_at_most_so_many_rows_of_every_file(file, tmp_path):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(file.read_text("utf-8"), "utf-8")
    (few,) = numbers(f"{file}#10")
    assert numbers(str(file), f"{file}#5", held_out=f"{held_out}#7", max_samples=10) == [
        few, *numbers(f"{file}#5"), *numbers(f"{file}#7"),
    ]  # fmt: skip
    assert numbers(str(file), held_out=str(held_out), max_samples=10) == [few, few]
    assert numbers(str(file), max_samples=1000) == [list(range(100))], "it is a limit, and no file has to reach it"


def test_the_sample_is_said(file):
    (found,) = read_files(DataConfig(data=(f"{file}#10",), held_out=0), Report())
    assert found.notes[-1] == f"{file}: a random sample of 10 of its 100 rows is used, the same in every run."


def test_more_rows_than_there_are_is_refused(file):
    with pytest.raises(DataError) as caught:
        numbers(f"{file}#101", f"{file}#200")
    assert caught.value.problems[0] == (
        f"data.data: {file}#101: the file has only 100 usable rows. Ask for fewer, or remove #101; to repeat rows, "
        "mix files by weight."
    )
    assert len(caught.value.problems) == 2


def test_a_run_knows_its_files_from_anywhere(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    data = {"data": ["rows.jsonl#10:0.7", "org/name#5:0.3"], "held_out": "rows.jsonl#7"}
    found = with_absolute_paths(load_config(None, {"data": data})).data
    assert found.data == (f"{file}#10:0.7", "org/name#5:0.3")
    assert found.held_out == f"{file}#7"
