"""Leakage: rows that an adapter was trained on are told, as long as its run folder can tell."""

from pathlib import Path

import pytest

from lorasmith.adapters.session import open_adapters
from lorasmith.data.dataset.prepare import leaked_sources
from lorasmith.model.row import Example
from lorasmith.runs.evaluate import EvaluationOptions, evaluate
from lorasmith.runs.leakage import leakage_warnings
from tests.support.tiny import Watch, rows_file, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trained(tmp_path / "run", seed=3)
    return tmp_path / "run"


def test_rows_that_were_learned_are_told_as_long_as_the_runs_files_say_so(run):
    own = rows_file(run.parent / "own.jsonl", range(20))

    def told(file: str) -> list[str]:
        report = Watch()
        evaluate([run / "adapter"], EvaluationOptions((file,)), report=report)
        return [text for text in report.warned if "trained on" in text]

    (text,) = told(own)
    assert text.startswith("run was trained on 9 rows of the evaluation data")  # of 12, 3 are held out
    assert "own.jsonl lines " in text
    assert told(rows_file(run.parent / "new.jsonl", range(20, 30))) == []
    rows_file(run.parent / "rows.jsonl", range(1, 13))
    assert told(own) == []


def test_nothing_is_told_of_an_adapter_outside_its_run(run, tmp_path):
    (run / "adapter").rename(tmp_path / "alone")
    session = open_adapters([tmp_path / "alone"])
    example = Example([1, 2, 3], [2, 3, -100], [1.0] * 3, "x:1")
    assert list(leakage_warnings(session, [example], Watch())) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff"])
def test_a_run_that_does_not_say_what_it_was_trained_on(run, text):
    (run / "environment.json").write_bytes(text.encode("latin-1"))
    report = Watch()
    evaluate([run], EvaluationOptions((rows_file(run.parent / "own.jsonl", range(20)),)), report=report)
    assert not [text for text in report.warned if "trained on" in text]


def test_leaked_are_examples_with_the_same_tokens():
    def example(ids: list[int], source: str) -> Example:
        return Example(ids, ids, [1.0] * len(ids), source)

    training = [example([1, 2], "a:1"), example([3], "a:2")]
    evaluation = [example([1, 2], "b:1"), example([1, 2, 3], "b:2"), example([3], "b:3")]
    assert leaked_sources(training, evaluation) == ["b:1", "b:3"]
    assert leaked_sources(training, []) == []
