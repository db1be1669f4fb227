"""The bench of preferences: its ratios, and the pairs that both programs get."""

import json
from pathlib import Path

import pytest
from bench.preference import COUNTS, TRL, figures
from bench.programs import Ran
from bench.rates import OURS, Measured

from bench import preference
from lorasmith.data.rows.preference import PAIRS, preference_problem


def measured(program: str, setting: str, seconds: float) -> Measured:
    return Measured(
        program, setting, COUNTS, 1000, Ran(1.0, 10, None, 2.0), Ran(1.0 + seconds, 10, None, 2.0 + seconds)
    )


def test_the_ratio_is_to_the_fastest_setting_of_trl():
    runs = [measured(OURS, "default", 10), measured(TRL, "default", 40), measured(TRL, "no recomputation", 25)]
    found = figures([*runs, measured(OURS, "default", 12), measured(OURS, "default", 11)])
    assert found["ratio"] == pytest.approx(25 / 11)
    assert found["ratio_by_cpu"] == pytest.approx(25 / 11)
    assert found["ratio_of_whole_runs"] == pytest.approx(26 / 12)
    assert "ratio" not in figures(runs[:1])


def test_the_pairs_end_with_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["Hi", "Hello", "And?"]
    chats = [
        {
            "messages": [
                {"role": ("user", "assistant")[k % 2], "content": f"{word} {i}"} for k, word in enumerate(words[:n])
            ]
        }
        for i, n in enumerate((2, 3, 2))
    ]
    monkeypatch.setattr(preference, "records_of", lambda kind: chats)
    rows = [json.loads(line) for line in preference._pairs_file(tmp_path, 2).read_text("utf-8").splitlines()]
    assert len(rows) == 2
    assert all(preference_problem(row, PAIRS, "dpo") is None for row in rows)
    assert rows[0]["rejected"] == rows[1]["chosen"]
