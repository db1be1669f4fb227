"""Files of preference rows that a tiny model can learn from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.tiny import ANSWERS, QUESTIONS


def pair(i: int) -> dict[str, Any]:
    """Texts, different for every i and of many lengths."""
    question = f"{QUESTIONS[i % 5]} {'Really? ' * (i % 4)}({i})"
    return {"prompt": question, "chosen": ANSWERS[(i + i // 5) % 5], "rejected": f"{ANSWERS[(i + 2) % 5]} {i * 7} bad"}


def rated(i: int) -> dict[str, Any]:
    """One answer to each question, every other one bad."""
    row = pair(i)
    return {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A JSONL file of these rows; its name as a flag has it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def pairs_file(path: Path, count: int = 12) -> str:
    """A file of pairs."""
    return write_rows(path, [pair(i) for i in range(count)])
