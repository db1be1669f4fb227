"""Lines fit in cells, in both languages and mixed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lorasmith.cli.wrap import CLOSING, OPENING, PIECE, hang, pad, wrap

CHINESE = "训练（平滑后）的损失，与基座“对比”；`train` 之后请运行 lorasmith chat runs/mine，或者换一个 --output。" * 3


@pytest.mark.parametrize("width", [20, 50, 80])
def test_chinese_breaks_within_its_sentences_but_not_before_a_comma(width):
    lines = wrap(CHINESE, width)
    assert max(map(cell_len, lines)) <= width
    assert "".join(lines).replace(" ", "") == CHINESE.replace(" ", "")
    assert not [line for line in lines[1:] if line[0] in CLOSING]
    assert not [line for line in lines if line[-1] in OPENING]
    assert sum(map(cell_len, lines[:-1])) > 0.75 * width * (len(lines) - 1)  # no ragged half lines


def test_english_breaks_at_spaces():
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("see a/very/long/path and more", 8, "  ") == ["see", "  a/very/long/path", "  and", "  more"]
    assert wrap("two\n\n  lines", 80) == ["two", "", "  lines"]


@given(st.text(alphabet="ab 中，（。\n", max_size=60), st.integers(6, 30))
def test_nothing_is_lost_and_only_one_word_is_too_wide(text, width):
    lines = wrap(text, width)
    assert [line for line in lines if cell_len(line) > width and len([*filter(None, PIECE.findall(line))]) > 1] == []
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_label_is_as_wide_as_its_column():
    assert [cell_len(pad(label, 10)) for label in ("on", "目标模块", "")] == [10, 10, 10]


def test_further_lines_stand_under_the_text_of_a_label():
    assert hang("rate     one two three\nthe next is plain", 17) == [
        "rate     one two",
        " " * 9 + "three",
        "the next is plain",
    ]
    assert hang("目标  一二三四五", 14) == ["目标  一二三四", "      五"]
