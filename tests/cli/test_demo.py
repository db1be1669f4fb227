"""What the demo shows at its end."""

import dataclasses
import io

import pytest

from lorasmith.cli.demo import show
from lorasmith.cli.screen import Screen
from lorasmith.demo.run import BeforeAfter, DemoResult
from lorasmith.training.run_files import read_summary
from tests.support.tiny import trained


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    run = tmp_path_factory.mktemp("demo") / "run"
    trained(run)
    summary = read_summary(run)
    assert summary is not None
    return DemoResult(summary, [BeforeAfter("Who?", "Him.", "Her.")], [(1, 3.0), (2, 2.5)])


def shown(result: DemoResult) -> str:
    file = io.StringIO()
    with Screen(file=file) as screen:
        show(result, screen)
    return file.getvalue()


def test_numbers_replies_and_what_to_type_next(result):
    text, summary = shown(result), result.summary
    assert f"held-out loss {summary.loss_before:.3f} -> {summary.loss_after:.3f}" in text
    assert f"{summary.interval[0]:+.3f} to {summary.interval[1]:+.3f}" in text
    for part in ("Who?", "Him.", "Her.", f"lorasmith chat {summary.run}", "lorasmith train YOUR.jsonl"):
        assert part in text, part


def test_a_run_that_was_not_evaluated_has_no_line_for_it(result):
    summary = dataclasses.replace(result.summary, loss_before=None, loss_after=None, interval=None)
    assert "held-out loss" not in shown(dataclasses.replace(result, summary=summary))
