"""Several files with weights."""

from collections import Counter

from lorasmith.data.dataset.mix import Mix, mix_rows


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
