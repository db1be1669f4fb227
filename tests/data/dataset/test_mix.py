"""Several files with weights."""

from collections import Counter

import pytest

from lorasmith.data.dataset.mix import Mix, mix_rows, parse_weights
from lorasmith.errors import ConfigError


def test_weights_and_names_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl:0.7").write_text("")
    words = ["a.jsonl:0.7", "C:\\rows.csv", "org/name:main", "modelscope:org/name"]
    assert parse_weights(words) == [(word, None) for word in words]
    assert parse_weights(["b.jsonl:7", "org/name:main:0.3"]) == [("b.jsonl", 7.0), ("org/name:main", 0.3)]


def test_weights_that_cannot_be():
    with pytest.raises(ConfigError) as caught:
        parse_weights(["a:0", "b:nan", "c", "d:1", "d:2", "e:-1"])
    assert caught.value.problems == (
        "data.data: a:0: the weight must be a number greater than 0.",
        "data.data: b:nan: the weight must be a number greater than 0.",
        "data.data: e:-1: the weight must be a number greater than 0.",
        "data.data: c has no weight, but other files do. Write c:WEIGHT, or remove all weights.",
        "data.data: d is given twice. Give it once, with one weight.",
    )


def test_an_epoch_has_these_parts_and_every_repeated_row_as_often_as_the_others():
    rows = [("a", n) for n in range(90)] + [("b", n) for n in range(10)]
    mix = Mix({"a": 7, "b": 3}, {"a": "a", "b": "b"})
    taken, said = mix_rows(rows, lambda row: row[0], mix, seed=0)
    assert Counter(file for file, _n in taken) == {"a": 70, "b": 30}
    assert set(Counter(row for row in taken if row[0] == "b").values()) == {3}
    assert len({row for row in taken if row[0] == "a"}) == 70
    assert said == [
        "a: 70 of its 90 rows per epoch, 70% of the epoch; 20 unused.",
        "b: its 10 rows 3.00 times per epoch, 30 in total, 30% of the epoch.",
    ]
    assert mix_rows(rows, lambda row: row[0], mix, seed=0)[0] == taken
    assert mix_rows(rows, lambda row: row[0], mix, seed=1)[0] != taken


def test_shares_are_whole_rows_and_a_file_without_rows_takes_no_part():
    rows = [("a", n) for n in range(5)] + [("b", n) for n in range(2)] + [("c", n) for n in range(3)]
    mix = Mix({"a": 1, "b": 1, "c": 1, "d": 5}, {"a": "a", "b": "b", "c": "c"})
    assert Counter(file for file, _n in mix_rows(rows, lambda row: row[0], mix, 0)[0]) == {"a": 4, "b": 3, "c": 3}
