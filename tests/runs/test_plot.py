"""Plots of losses: names, smoothing, and words that the font has."""

import pytest

from lorasmith.i18n import language, using_language
from lorasmith.runs.plot import plot_loss, short_names, smooth


def test_a_picture_has_only_words_that_it_can_draw(tmp_path, recwarn):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "held_out_loss": 2.5}\n', "utf-8"
    )
    with using_language("zh"):
        plot_loss([tmp_path], tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size
        assert language() == "zh"
    assert not [one for one in recwarn if "missing from" in str(one.message)]  # matplotlib: no such letter in the font


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert short_names(runs) == [str(runs[0]), str(runs[1]), "other"]
    assert short_names(runs[1:]) == ["run", "other"]


def test_smoothing_by_hand():
    assert smooth([3.0]) == pytest.approx([3.0])
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.8 * 0.2 * 1.0 + 0.2 * 2.0) / (1 - 0.8**2)])
    assert smooth([5.0] * 20) == pytest.approx([5.0] * 20)
    assert smooth([]) == []
