"""Curves as text: from corner to corner, and in words."""

import math

import pytest

from lorasmith.cli.curve import curve, curve_in_words


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("width", [10, 40, 79, 119])
def test_the_curve_falls_from_corner_to_corner(plain, width):
    lines = curve([(step, 5.0 - step / 100) for step in range(1, 201)], width=width, height=6, plain=plain).splitlines()
    assert len(lines) == 7
    assert max(map(len, lines)) <= max(width, 12)
    assert lines[0].lstrip().startswith("4.990")
    assert lines[5].lstrip().startswith("3.000")
    starts = [len(line) for line in lines[:6]]
    assert starts == sorted(starts)
    assert plain == "\n".join(lines).isascii()


def test_the_curve_of_little():
    assert curve([]) == ""
    assert curve([(3, 1.5), (4, math.nan)]) == "3: 1.500"
    assert "2.000" in curve([(1, 2.0), (2, 2.0)])


def test_a_gap_between_two_points_is_a_line():
    rows = curve([(0, 0.0), (100, 1.0)], width=30, height=5, plain=True).splitlines()[:-1]
    starts = [row.index("*") for row in rows]
    assert starts == sorted(starts, reverse=True)  # it rises to the right, and no row is empty
    assert rows[0].rstrip().endswith("*")


def test_values_that_are_not_finite_are_left_out():
    points = [(1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf)]
    assert curve(points) == curve([(1, 2.0), (3, 1.0)])
    assert curve_in_words(points, "loss")[-1] == "loss: last 1.000 at step 3"


def test_a_curve_in_words():
    points = [(1, 3.0), (5, 1.25), (9, 2.0)]
    assert curve_in_words(points, "loss") == [
        "loss: first 3.000 at step 1",
        "loss: lowest 1.250 at step 5",
        "loss: last 2.000 at step 9",
    ]
    assert curve_in_words([], "loss") == []
