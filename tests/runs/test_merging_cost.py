"""The held-out loss before and after merging."""

from pathlib import Path

import pytest

from lorasmith.adapters.merge import merge_run
from lorasmith.config.model import ModelConfig
from lorasmith.errors import DataError
from lorasmith.report import Report
from lorasmith.runs.merging_cost import merging_cost
from tests.support.tiny import rows_file, trained


class Said(Report):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts = list[str]()

    def say(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("form", ["none", "nf4"])
def test_merging_costs_no_more_than_rounding(form: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", quantize=form)
    report, file = Said(), str(rows_file(tmp_path / "more.jsonl"))
    exact = merge_run(tmp_path / "run", tmp_path / "exact")
    cost = merging_cost(tmp_path / "run", exact, file, report=report)
    assert abs(cost.difference) < 1e-5
    assert "Held-out loss " in report.texts[-1]
    rounded = merge_run(tmp_path / "run", tmp_path / "rounded", ModelConfig(dtype="bfloat16"))
    assert 0 < abs(merging_cost(tmp_path / "run", rounded, file).difference) < 0.1


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    merged = merge_run(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        merging_cost(tmp_path / "run", merged, str(tmp_path / "none.jsonl"))
