"""lorasmith eval on a run on preferences: the same numbers as its summary, and several adapters by the first's loss."""

from pathlib import Path

import pytest

from lorasmith import train
from lorasmith.errors import RunError
from lorasmith.evaluation.preference import PreferenceComparison
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from lorasmith.training.run_files import REFERENCE, read_summary
from tests.support.preferences import pairs_file
from tests.support.tiny import rows_file, settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    files = pairs_file(folder / "pairs.jsonl")
    for method in ("dpo", "kto", "orpo"):
        train(files, output=folder / method, **settings(method=method, learning_rate=5e-3))
    return {method: folder / method for method in ("dpo", "kto", "orpo")}


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_run_is_evaluated_as_its_summary_says(runs, method):
    found, summary = evaluate([runs[method]]).adapters[0].loss, read_summary(runs[method])
    assert isinstance(found, PreferenceComparison)
    assert (found.before, found.after) == pytest.approx((summary.loss_before, summary.loss_after), rel=1e-6)
    assert (found.low, found.high) == pytest.approx(summary.interval, rel=1e-5)
    assert found.accuracy == summary.accuracy
    assert found.margin == pytest.approx(summary.margin, rel=1e-5)


def test_it_has_no_perplexity_and_answers_each_prompt_once(runs):
    result = evaluate([runs["dpo"]], EvaluationOptions(answers=3))
    assert [group.name for group in result.groups()][:1] == ["held-out preference loss"]
    assert "perplexity" not in [group.name for group in result.groups()]
    assert len({sample.source for sample in result.samples}) == len(result.samples) == 3
    assert result.to_json()["accuracy"] == result.adapters[0].loss.accuracy


def test_two_adapters_are_compared_by_the_loss_of_the_first(runs):
    found = [adapter.loss for adapter in evaluate([runs["dpo"], runs["orpo"]]).adapters]
    assert found[0].before == found[1].before
    assert found[0].after == pytest.approx(read_summary(runs["dpo"]).loss_after, rel=1e-6)


def test_on_a_file_it_is_evaluated_as_on_examples(runs, tmp_path):
    result = evaluate([runs["dpo"]], EvaluationOptions(files=(rows_file(tmp_path / "rows.jsonl"),)))
    assert "perplexity" in [group.name for group in result.groups()]


def test_without_its_reference_it_says_so(runs, tmp_path):
    reference = (runs["kto"] / REFERENCE).read_bytes()
    (runs["kto"] / REFERENCE).unlink()
    with pytest.raises(RunError, match=r"reference\.safetensors: cannot be read"):
        evaluate([runs["kto"]])
    (runs["kto"] / REFERENCE).write_bytes(reference)
