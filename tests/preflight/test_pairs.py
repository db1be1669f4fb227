"""What is said about preference rows before a training: their number, the lengths of the answers, shared prompts."""

from pathlib import Path

import pytest

from lorasmith.config.training import usual_rate
from lorasmith.preflight.check import check
from lorasmith.preflight.facts import labeled_facts
from lorasmith.preflight.pairs import preference_text
from tests.support.checks import config, job_of
from tests.support.preferences import pair, pairs_file, rated, write_rows


def test_pairs_their_lengths_and_what_shared_prompts_save(tmp_path: Path) -> None:
    job = job_of(pairs_file(tmp_path / "a.jsonl", 6), tmp_path / "run", method="dpo", held_out=0)
    answers = [[one.n_targets for one in job.train[k::2]] for k in (0, 1)]
    shown = [f"{min(some)}-{max(some)} (mean {sum(some) / 6:.0f})" for some in answers]
    whole = sum(one.useful_length for one in job.train)
    prompts = sum(one.learned[0] + 1 for one in job.train[::2])
    assert preference_text(job) == (
        f"6 pairs: chosen answers of {shown[0]} tokens, rejected ones of {shown[1]}; shared prompts are computed once: "
        f"{sum(job.plan.lengths)} instead of {whole} tokens"
    )
    assert whole - prompts >= sum(job.plan.lengths) > whole - prompts - 6 * 8  # answers may begin alike


def test_rated_answers(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [rated(i) for i in range(5)])
    job = job_of(file, tmp_path / "run", method="kto", held_out=0)
    assert preference_text(job).startswith("2 good answers of ")
    assert ", 3 bad answers of " in preference_text(job)
    only = write_rows(tmp_path / "b.jsonl", [rated(i) for i in (1, 3)])
    assert preference_text(job_of(only, tmp_path / "run", method="kto", held_out=0)).endswith(
        "0 bad answers of 0 tokens"
    )


def test_check_shows_both_answers_and_names_rows_that_are_left_out(tmp_path: Path) -> None:
    rows = [
        pair(0),
        pair(1) | {"rejected": pair(1)["chosen"]},
        *(pair(i) for i in range(2, 9)),
        pair(9) | {"chosen": ""},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    found = check(config(file, method="dpo"))
    assert [problem.partition("jsonl ")[2] for problem in found.problems] == [
        "line 2: 'chosen' and 'rejected' are equal, so neither is better. Remove the row.",
        "line 10: 'chosen' is empty, so there is nothing to compare. Fill it in, or remove the row.",
    ]
    made = config(file, method="dpo")
    made = made.model_copy(update={"data": made.data.model_copy(update={"skip_bad_rows": 2.0})})
    found = check(made)
    assert not found.problems
    assert sum("skipped" in text for text in found.warnings) == 2
    assert [row.why for row in found.rows][:2] == [
        "the chosen answer of the first row",
        "the rejected answer of the first row",
    ]
    assert found.facts is not None
    assert dict(labeled_facts(found.facts))["pairs"].startswith("5 pairs: ")
    assert found.facts.examples == 5
    assert found.facts.held_out == 3


@pytest.mark.parametrize(("method", "rate"), [("dpo", 2.5e-5), ("simpo", 2.5e-5), ("orpo", 1e-4)])
def test_the_usual_learning_rate_is_not_that_of_examples(tmp_path: Path, method: str, rate: float) -> None:
    made = config(pairs_file(tmp_path / "a.jsonl"), method=method)
    values = made.training.model_dump(exclude_unset=True)
    values.pop("learning_rate")
    facts = check(made.model_copy(update={"training": type(made.training)(**values)})).facts
    assert facts is not None
    assert facts.learning_rate == pytest.approx(rate)
    assert facts.why["learning_rate"] == "the usual value for this method on a small base model"
    assert usual_rate(7_000_000_000, method) == pytest.approx(rate / 5)
