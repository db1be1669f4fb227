"""Marks of what is trained on: what they mean, alone and together."""

import math

import pytest

from lorasmith.data.rows.marks import (
    DETAILS,
    FLAGS,
    WEIGHTS,
    exclusions,
    is_learned,
    marks_problem,
    masked_spans,
    wants_training,
    weight_of,
)


def part(begin, end, train):
    return {"begin_offset": begin, "end_offset": end, "train": train}


@pytest.mark.parametrize("key", FLAGS)
def test_every_flag_excludes_a_message_and_null_does_not(key):
    assert not is_learned({key: False})
    assert is_learned({key: True})
    assert is_learned({key: None})
    assert (exclusions({key: False}), exclusions({key: True})) == ([key], [])
    assert marks_problem({key: 0}, 5) == f"'{key}' must be true or false, found a number."


def test_torchtunes_mark_says_the_opposite():
    assert not is_learned({"masked": True})
    assert is_learned({"masked": False})
    assert exclusions({"masked": True}) == ["masked"]


def test_weights_are_multiplied():
    assert weight_of({}) == 1
    assert weight_of({"weight": 0.5, "loss_weight": 3, "loss_scale": None}) == 1.5
    assert exclusions({"loss_scale": 0.0, "weight": 1}) == ["loss_scale"]
    for key in WEIGHTS:
        assert marks_problem({key: True}, 5) == f"'{key}' must be a number, found true or false."
        assert marks_problem({key: math.nan}, 5) == f"'{key}' must be between 0 and 1000000, found nan."
        assert wants_training({key: 1})
        assert not wants_training({key: 0})


@pytest.mark.parametrize("key", DETAILS)
def test_parts_as_axolotl_documents_them(key):
    """Both offsets are included, and what no part trains on is left out."""
    text = "I'm doing very well, thank you!"
    message = {key: [part(0, 8, False), part(9, 18, True), part(19, 30, False)]}
    assert [text[a:b] for a, b in masked_spans(message, len(text))] == ["I'm doing", ", thank you!"]
    assert is_learned(message)
    assert masked_spans({key: [part(9, 18, True), part(0, 8, True)]}, 19) == ()
    assert masked_spans({key: [part(2, 3, True), part(3, 3, True)]}, 5) == ((0, 2), (4, 5))
    assert not is_learned({key: [part(0, 4, False)]})
    assert wants_training(message)
    assert not wants_training({key: [part(0, 4, False)]})
    assert exclusions({key: [part(0, 4, False)]}) == [key]
    assert masked_spans({}, 5) == ()


@pytest.mark.parametrize(
    ("details", "problem"),
    [
        ("all", "must be a list of parts of the text, each like"),
        ([{"begin_offset": 0, "end_offset": 2}], "must be a list of parts"),
        ([part(0, True, True)], "must be a list of parts"),
        ([part(0, 2, True), part(3, 5, True)], "part 2 is from 3 to 5, but the text has the characters 0 to 4."),
        ([part(2, 1, True)], "part 1 is from 2 to 1"),
    ],
)
def test_parts_that_are_not_of_the_text(details, problem):
    assert problem in marks_problem({"train_detail": details}, 5)
    assert marks_problem({"train_detail": None}, 5) is None
