"""Each sentence appears where it is true, and only there."""

from lorasmith.runs.study.findings import findings, interval_text, verdict
from tests.support.studies import made_up

SEEDS = (-0.01, 0.0, 0.01)


def around(*losses: float) -> dict[float, list[float | None]]:
    """Losses of three seeds at the rates 1e-4, 1e-3, ..."""
    return {10.0 ** (place - 4): [loss + s for s in SEEDS] for place, loss in enumerate(losses)}


def said(losses, **more) -> str:
    return "\n".join(findings(made_up(losses, **more)))


def test_the_best_setting_comes_first():
    text = said({"lora": around(2.5, 2.0, 2.5)})
    assert text.startswith(
        "The lowest held-out loss has init_lora_weights lora, lr 0.001: 2.0000 (the mean of 3 seeds)."
    )
    assert "No setting is better than the base model" not in text
    assert "No setting is better than the base model, whose loss is 3.0000." in said({"lora": around(3.5, 3.1, 3.4)})


def test_a_curve_that_is_worse_and_one_that_cannot_be_told_apart():
    text = said({"lora": around(2.5, 2.0, 2.5), "dora": around(2.6, 2.2, 2.9), "rslora": around(2.5, 2.001, 2.4)})
    worse = "init_lora_weights dora at its best learning rate of 0.001 is worse than init_lora_weights lora, lr 0.001: "
    assert worse + "+0.2000 (+10.0%), 95% confidence interval over examples [" in text
    assert "that is larger than the noise." in text
    assert "init_lora_weights rslora at its best learning rate of 0.001 cannot be told apart from" in text


def test_a_difference_that_only_some_seeds_show_is_within_the_noise():
    result = made_up({"lora": around(2.5, 2.0, 2.5), "dora": {1e-3: [2.3, 1.95, 2.0]}})
    (curve,) = [curve for curve in result.curves if curve.name.endswith("dora")]
    assert curve.best.from_best.examples.is_significant
    assert verdict(curve.best.from_best) == "no clear difference"
    assert "over 3 seeds [" in interval_text(curve.best.from_best)


def test_a_best_rate_at_an_end_of_the_grid_is_pointed_out():
    beyond = "is the highest of the grid, so a better one may lie beyond it."
    assert f"init_lora_weights lora: the best learning rate {beyond}" in said({"lora": around(2.5, 2.2, 2.0)})
    assert "is the lowest of the grid" in said({"lora": around(2.0, 2.2, 2.5)})
    assert "of the grid" not in said({"lora": around(2.5, 2.0, 2.2)})


def test_rates_that_are_as_good_are_named():
    text = said({"lora": around(2.5, 2.0, 2.002, 2.9)})
    assert "Of the other values of learning rate there, these cannot be told apart from the best: 0.01." in text
    assert "Of the other values" not in said({"lora": around(2.5, 2.0, 2.5)})


def test_forgetting_is_said_with_its_sign():
    losses = {"lora": around(2.5, 2.0, 2.5)}
    assert "lr 0.001 forgot: its loss on the general text rose by 0.0500 from 3.1000." in said(losses)
    assert "forgot nothing: its loss on the general text changed by -0.0500" in said(losses, forgot=-0.05)
    assert "+0.0050 from 3.1000, is within the noise." in said(losses, forgot=0.005)


def test_seeds_are_asked_for_where_there_is_one_or_two():
    one = said({"lora": {1e-4: [2.0], 1e-3: [2.5], 1e-2: [2.9]}})
    assert "Each setting was trained with one seed" in one
    assert "differ only in their seed" not in one
    two = said({"lora": {1e-4: [2.0, 2.1], 1e-3: [2.5, 2.6], 1e-2: [2.9, 2.8]}})
    assert "With two seeds, an interval over seeds is wide" in two
    three = said({"lora": around(2.5, 2.0, 2.5)})
    assert "With two seeds" not in three
    assert "Runs that differ only in their seed differ by 0.0200 in the median, and by at most 0.0200." in three
    assert "The best of 3 settings was chosen by the same held-out examples" in three


def test_failed_and_open_runs_are_named():
    text = said({"lora": {1e-4: [2.0, 2.1, 2.0], 1e-2: [None, None, None]}})
    assert (
        "Failed, mostly because the training diverged: lora_lr0.01_seed0, lora_lr0.01_seed1, lora_lr0.01_seed2." in text
    )
    nothing = findings(made_up({"lora": {1e-2: [None]}}))
    assert nothing == ["Failed, mostly because the training diverged: lora_lr0.01_seed0."]
