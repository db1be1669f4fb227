"""What an evaluation says: lines, verdicts in words, and JSON."""

import json

import pytest

from lorasmith.evaluation.generation import Answer
from lorasmith.evaluation.loss import Comparison
from lorasmith.evaluation.metrics import MetricComparison
from lorasmith.evaluation.results import AdapterEvaluation, ComparedAnswers, Evaluation, Forgetting


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Forgetting(1.0, 2.0, 0.5, 1.5, 10), "significant FORGETTING"),
        (Forgetting(2.0, 1.0, -1.5, -0.5, 10), "no forgetting: significantly better"),
        (Forgetting(1.0, 2.0, -0.5, 1.5, 10), "no significant forgetting"),
        (Forgetting(1.0, 2.0, 0.5, 1.5, 9), "too few rows to tell"),
    ],
)
def test_what_was_forgotten_in_words(found, words):
    assert found.verdict.startswith(words)


@pytest.fixture
def evaluation() -> Evaluation:
    """Two adapters: the first better, the second worse and forgetful."""
    good = AdapterEvaluation(
        "good", "runs/good", Comparison(2.0, 1.0, -1.5, -0.5, 20),
        (MetricComparison(10.0, 20.0, 5.0, 15.0, 20, "chrf", "chrF"),), Forgetting(3.0, 3.0, -0.1, 0.1, 40),
    )  # fmt: skip
    bad = AdapterEvaluation(
        "bad", "runs/bad", Comparison(2.0, 2.5, 0.1, 0.9, 20),
        (MetricComparison(10.0, 4.0, -9.0, -3.0, 20, "chrf", "chrF"),), Forgetting(3.0, 4.0, 0.5, 1.5, 40),
    )  # fmt: skip
    sample = ComparedAnswers("Why?", "So.", "rows.jsonl:1", Answer("", "length"), (Answer("So.", "stop"),) * 2)
    return Evaluation("base", ("rows.jsonl",), "texts/general.jsonl", (good, bad), (sample,))


def test_every_metric_has_a_line_for_the_base_and_each_adapter(evaluation):
    groups = {group.name: group.lines for group in evaluation.groups()}
    assert list(groups) == ["held-out loss", "perplexity", "chrF", "loss on general.jsonl"]
    assert [[line.who for line in lines] for lines in groups.values()] == [["base", "good", "bad"]] * 4
    assert [line.value for line in groups["held-out loss"]] == ["2.0000", "1.0000", "2.5000"]
    assert [line.value for line in groups["perplexity"]] == ["7.4", "2.7", "12.2"]
    assert groups["held-out loss"][1].interval == "[-1.5000, -0.5000]"
    assert [line.difference for line in groups["chrF"]] == ["", "+10.0", "-6.0"]


def test_lower_is_better_for_a_loss_and_higher_for_a_metric(evaluation):
    tones = {group.name: [line.tone for line in group.lines[1:]] for group in evaluation.groups()}
    assert tones["held-out loss"] == tones["chrF"] == ["good", "bad"]
    assert tones["loss on general.jsonl"] == ["", "bad"]
    assert tones["perplexity"] == ["", ""]


def test_metrics_of_one_verdict_are_one_sentence(evaluation):
    verdicts = evaluation.verdicts()
    assert len(verdicts) == 5
    assert "held-out loss" in verdicts[0]
    assert "chrF" in verdicts[0]
    assert [text.split(":")[0] for text in verdicts] == ["good", "good", "bad", "bad", "bad"]


def test_json_keeps_its_keys(evaluation):
    found = json.loads(json.dumps(evaluation.to_json()))
    assert (found["before"], found["after"], found["difference"]) == (2.0, 1.0, -1.0)
    assert set(found["adapters"][0]) == {"name", "folder", "loss", "scores", "forgotten"}
    assert found["adapters"][1]["scores"]["chrf"]["is_real"] is True
    assert found["adapters"][0]["forgotten"]["is_real"] is False
    assert set(found["samples"][0]) == {"prompt", "reference", "source", "base", "adapters"}
    assert found["samples"][0]["base"] == {"text": "", "finish": "length"}
