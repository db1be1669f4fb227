"""Held-out rows and parts of the training rows for runs that are compared with each other."""

import json

import pytest

from lorasmith.config.data import DataConfig
from lorasmith.config.values import check
from lorasmith.data.dataset.prepare import Prepared, prepare
from lorasmith.data.template.encoding import Template
from lorasmith.errors import ConfigError, DataError


@pytest.fixture
def prepared(tmp_path, make):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"instruction": f"sky {n}?", "output": "blue"}) + "\n" for n in range(100)), "utf-8"
    )

    def prepared(seed: int = 0, **options) -> Prepared:
        return prepare(DataConfig(data=(str(file),), held_out=10, **options), Template.of(make(None)), None, seed=seed)

    return prepared


def sources(examples) -> list[str]:
    return [example.source for example in examples]


def test_the_held_out_rows_follow_the_seed_of_the_training_or_their_own(prepared):
    assert prepared(0).held_out_sha256 != prepared(1).held_out_sha256
    one, other = prepared(0, held_out_seed=7), prepared(1, held_out_seed=7)
    assert one.held_out_sha256 == other.held_out_sha256 == prepared(7).held_out_sha256
    assert one.train_sha256 == other.train_sha256


def test_fewer_rows_are_a_part_of_more_and_the_held_out_ones_stay(prepared):
    made = {rows: prepared(train_rows=rows, held_out_seed=0) for rows in (5, 20, 0.5, 1, 90, 1000, None)}
    assert {rows: len(one.train) for rows, one in made.items()} == {
        5: 5,
        20: 20,
        0.5: 45,
        1: 90,
        90: 90,
        1000: 90,
        None: 90,
    }
    assert len({one.held_out_sha256 for one in made.values()}) == 1
    assert set(sources(made[5].train)) < set(sources(made[20].train)) < set(sources(made[0.5].train))
    assert sources(made[20].train) == [s for s in sources(made[None].train) if s in set(sources(made[20].train))]
    assert sources(prepared(1, train_rows=20, held_out_seed=0).train) != sources(made[20].train)
    assert any("Training on 20 of 90 rows, a random sample." in note for note in made[20].notes)


def test_a_share_of_less_than_a_row_is_refused(prepared):
    with pytest.raises(DataError, match=r"data\.train_rows: the fraction 0\.001 of 90 rows is less than one row"):
        prepared(train_rows=0.001)


def test_a_number_of_rows_is_whole():
    with pytest.raises(ConfigError, match="whole number of rows"):
        check(DataConfig, {"train_rows": 2.5})
