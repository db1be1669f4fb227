"""Datasets of another program as ours: names, columns and numbers of rows."""

from lorasmith.config.data import DataConfig
from lorasmith.config.migrate.datasets import Datasets, base_model, first_rows, local_or_hub
from lorasmith.config.migrate.migration import Migration
from lorasmith.config.migrate.reading import Foreign


def test_names_and_columns_of_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    migration = Migration(Foreign(tmp_path / "a.yaml", {"sets": "x"}), "P", {})
    datasets = Datasets(migration, "sets")
    datasets.add("a.jsonl", {"output": "reply", "input": "input"})
    datasets.add("a.jsonl", {})
    datasets.add("b.jsonl", {"output": "reply"}, rows=9)
    datasets.move()
    assert list(migration.unmatched) == ["sets: a.jsonl"]  # named twice
    assert migration.comments["data.data"] == "from sets"
    assert migration.values == {"data": {"data": ["a.jsonl", "b.jsonl#9"], "map": {"output": "reply"}}}
    assert not migration.refusals
    datasets.add("c.jsonl", {"output": "answer"}, rows=5)
    assert datasets.columns == {"output": "reply", "c.jsonl:output": "answer"}
    assert DataConfig(data=tuple(datasets.names), map=datasets.columns).map_of("c.jsonl") == {"output": "answer"}


def test_data_of_the_command_line_needs_no_columns_of_theirs(tmp_path):
    migration = Migration(Foreign(tmp_path / "a.yaml", {}), "P", {"data": {"data": ["mine.jsonl"]}})
    datasets = Datasets(migration, "sets")
    datasets.add("a.jsonl", {"output": "reply"})
    datasets.refuse("dataset_kind", "a")
    datasets.move()
    assert "map" not in migration.values["data"]
    assert not migration.refusals


def test_rows_from_the_beginning_and_held_out_parts(tmp_path):
    migration = Migration(Foreign(tmp_path / "a.yaml", {}), "P", {})
    train = Datasets(migration, "sets")
    train.add("org/a", {}, rows=9, are_first=True)
    train.move()
    assert migration.comments["data.data"] == "from sets; there the first rows; lorasmith draws them at random"
    held_out = Datasets(migration, "tests", train.columns)
    splits = ("train[9:20]", "train[:9]", "test", "train", None)
    assert [held_out.lacks("tests.split", split) for split in splits] == [True, True, True, False, False]
    assert not train.lacks("sets.split", "test")
    assert list(migration.unmatched) == ["tests.split: train[9:20]", "tests.split: train[:9]", "tests.split: test"]


def test_files_are_found_before_names_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "rows").write_text("", "utf-8")
    migration = Migration(Foreign(tmp_path / "a.yaml", {}), "P", {})
    assert local_or_hub(migration, "org/rows", "modelscope:") == "org/rows"
    assert local_or_hub(migration, "org/other", "modelscope:") == "modelscope:org/other"
    assert local_or_hub(migration, "./other.jsonl", "modelscope:") == "./other.jsonl"
    migration = Migration(Foreign(tmp_path / "a.yaml", {"model": "org"}), "P", {})
    base_model(migration, "model", "modelscope:")
    assert migration.value("model.model") == "org"


def test_a_number_of_rows_in_a_split():
    splits = ("train[:500]", "train", "train[:5%]", "train[5:]", "test[:5]", None, 5)
    assert [first_rows(split) for split in splits] == [500, None, None, None, None, None, None]
