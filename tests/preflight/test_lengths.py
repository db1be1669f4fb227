"""The histogram: every row is in one bar, and truncated rows are counted."""

import itertools

import pytest

from lorasmith.data.template.encoding import Template
from lorasmith.model.row import IGNORED, Example
from lorasmith.preflight.lengths import Bar, histogram
from tests.preflight.test_rows import _messages
from tests.support.tiny import tokenizer

STOP = 9


def test_every_row_stands_in_one_bar():
    template = Template.of(tokenizer("llama"))
    examples = [template.encode_all(_messages(i))[0] for i in range(40)]
    bars = histogram(examples, template.stop_ids)
    assert 2 <= len(bars) <= 10
    assert sum(bar.rows for bar in bars) == 40
    assert all(bar.cut == 0 for bar in bars)
    assert all(a.high + 1 == b.low for a, b in itertools.pairwise(bars))


def _example(length: int, last: int = STOP) -> Example:
    """`length` tokens, of which only the last is a target."""
    return Example([0] * (length - 1) + [last], [IGNORED] * (length - 2) + [last, IGNORED], [1.0] * length, "")


def test_truncated_rows_are_counted_in_the_bar_of_their_length():
    examples = [_example(12), _example(40), _example(40, last=1), _example(40, last=1)]
    bars = histogram(examples, [STOP])
    assert [bar for bar in bars if bar.rows] == [Bar(9, 12, 1, 0), Bar(37, 40, 3, 2)]


@pytest.mark.parametrize(("longest", "width"), [(2, 1), (10, 2), (26, 4), (1000, 200), (100_000, 20_000)])
def test_bars_have_one_round_width(longest, width):
    bars = histogram([_example(2), _example(longest)], [STOP])
    assert {bar.high - bar.low + 1 for bar in bars} == {width}
    assert bars[0].low <= 2
    assert bars[-1].low <= longest <= bars[-1].high
