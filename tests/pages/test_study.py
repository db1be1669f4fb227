"""The page of a study: its pictures, its tables, and that it says the same in both languages."""

import re
from dataclasses import replace

import pytest

from lorasmith.i18n import using_language
from lorasmith.pages.study import HEIGHT, WIDTH, charts, render_page, write_page
from lorasmith.runs.study.result import combined
from tests.support.studies import made_up

LOSSES = {
    "lora": {1e-4: [2.5, 2.52, 2.48], 1e-3: [2.0, 2.01, 1.99], 1e-2: [9.0, None, 2.2]},
    "<dora>": {1e-4: [2.4, 2.42, 2.38], 1e-3: [2.005, 2.0, 2.02]},
}


@pytest.fixture(scope="module")
def result():
    return made_up(LOSSES)


def test_every_run_is_a_point_and_the_line_joins_the_medians(result):
    (chart,) = charts(result)
    first, second = chart.lines
    assert [len(line.points) for line in chart.lines] == [9, 6]
    assert first.points[0].title == "lora_lr0.0001_seed0: 2.5000"
    places = [tuple(map(float, point.split(","))) for point in first.pieces[0].split()]
    assert places[0] == (first.points[0].x, first.points[0].y), "2.5 is the median of the first setting"
    assert places[1][1] > places[0][1], "a lower loss is drawn lower"
    assert second.pieces[0].count(",") == 2
    assert (first.best, second.best) == ("2.0000 at 0.001", "2.0083 at 0.001")


def test_the_axis_of_rates_is_logarithmic(result):
    ticks = charts(result)[0].ticks
    assert [tick.text for tick in ticks] == ["0.0001", "0.001", "0.01"]
    assert ticks[1].at - ticks[0].at == pytest.approx(ticks[2].at - ticks[1].at, abs=0.2)


def test_close_values_are_on_a_linear_axis():
    (chart,) = charts(made_up({"lora": {1.0: [2.0], 2.0: [2.1], 3.0: [2.2]}}))
    at = [tick.at for tick in chart.ticks]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2)


def test_failed_runs_and_losses_far_above_are_crosses_at_the_edge(result):
    points = charts(result)[0].lines[0].points
    clipped = [point for point in points if point.clipped]
    assert [point.title for point in clipped] == ["lora_lr0.01_seed0: 9.0000", "lora_lr0.01_seed1: failed"]
    assert {point.y for point in clipped} == {0.0}
    assert all(0 <= point.x <= WIDTH and 0 <= point.y <= HEIGHT for point in points)


def test_many_curves_are_divided_into_charts():
    """The first and the best are in each, to compare the others with."""
    losses = [2.0, *(2.1 + i / 100 for i in range(6)), 1.9]
    many = charts(made_up({f"m{i}": {1e-4: [loss], 1e-3: [2.1]} for i, loss in enumerate(losses)}))
    names = [[line.name for line in chart.lines] for chart in many]
    assert [len(own) for own in names] == [6, 4]
    assert all(own[:2] == [names[0][0], names[0][1]] for own in names)
    assert len({name for own in names for name in own}) == 8


def test_a_run_that_went_wrong_does_not_flatten_all_others():
    losses = {1e-4: [2.0], 3e-4: [2.01], 1e-3: [2.02], 3e-3: [2.03], 1e-2: [2.9]}
    (chart,) = charts(made_up({"lora": losses}))
    assert [dot.clipped for dot in chart.lines[0].points] == [False, False, False, False, True]
    places = [dot.y for dot in chart.lines[0].points[:4]]
    assert max(places) - min(places) > 40  # of 240


def test_a_study_without_numbers_on_an_axis_has_no_picture():
    assert charts(made_up({"lora": {1e-3: [2.0, 2.1]}})) == []
    assert charts(made_up({"lora": {1e-3: [None], 1e-2: [None]}})) == []


def test_the_page_has_what_was_measured_and_escapes_names(result, tmp_path):
    write_page(result, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text("utf-8")
    for text in (
        "What was found", "Held-out loss over learning rate", "base model", "1.9900 – 2.0100", "the best", "worse",
        "no clear difference", "1 of 3 seeds failed", "+0.0500", "1 min 01 s", "4,096", "step 2: loss nan, not finite",
        "60 held-out examples, the same for all runs", "A processor",
    ):  # fmt: skip
        assert text in page, text
    assert "<dora>" not in page
    assert "&lt;dora&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is loaded from elsewhere"


def test_the_page_is_chinese_where_the_reader_is(result):
    with using_language("zh"):
        page = render_page(result)
    words = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    english = set(re.findall(r"[A-Za-z]{3,}", words)) - {
        "made",
        "tiny",
        "rows",
        "jsonl",
        "lorasmith",
        "torch",
        "processor",
    }
    assert english <= {
        "lora",
        "dora",
        "init",
        "weights",
        "seed",
        "step",
        "loss",
        "nat",
        "token",
        "nan",
        "not",
        "finite",
        "MiB",
        "lr",
        "Student",
    }


def test_scores_of_answers_have_their_intervals_where_these_are_known(result):
    cell = next(cell for cell in result.cells if cell.loss)
    scored = replace(cell, scores={"exact": (10.0, 60.0), "f1": (20.0, 70.0)}, score_intervals={"exact": (38.0, 62.0)})
    page = render_page(replace(result, cells=(scored,)))
    assert "exact 10.0 → 60.0 [+38.0, +62.0]" in page
    assert "f1 20.0 → 70.0" in page


def test_curves_that_are_not_trained_yet_are_in_no_picture(result):
    waiting = [replace(cell, state="open", loss=None) for cell in result.cells if cell.name.startswith("<dora>")]
    rest = [cell for cell in result.cells if not cell.name.startswith("<dora>")]
    started = combined(result.study, result.base, result.data, 60, result.axis, [*rest, *waiting], {}, result.machine)
    assert [curve.is_open for curve in started.curves] == [False, True]
    assert [len(chart.lines) for chart in charts(started)] == [1]


def test_a_base_model_far_above_is_left_out_so_that_differences_can_be_seen():
    close = made_up({"lora": {1e-4: [2.02], 1e-3: [2.0], 1e-2: [9.0]}})  # and the base model has 3.0
    (chart,) = charts(close)
    assert chart.base is None
    assert [point.clipped for point in chart.lines[0].points] == [False, False, True]
    assert chart.lines[0].points[0].y < HEIGHT / 3 < 2 * HEIGHT / 3 < chart.lines[0].points[1].y
    assert charts(made_up({"lora": {1e-4: [2.5], 1e-3: [2.0]}}))[0].base is not None
