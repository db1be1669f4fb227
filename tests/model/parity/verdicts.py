"""What is known to work with each family: verdicts.json, which `make parity` and the tests compare with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.model.parity.trial import DTYPES

FILE = Path(__file__).with_name("verdicts.json")
ORDER = ("packed", "padded", "one by one", "refused", "not built", "fails")  # from the best on

Verdicts = Mapping[str, Mapping[str, str]]  # family -> dtype or "peft" -> verdict


def known() -> dict[str, dict[str, str]]:
    """The verdicts on record."""
    return json.loads(FILE.read_text("utf-8"))  # type: ignore[no-any-return]


def verdicts_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The verdicts in the results of families; stages that are refused by name are part of them."""
    return {
        family: {dtype: _with_refusals(one[dtype]) for dtype in DTYPES} | {"peft": one[DTYPES[0]]["peft"].split(" ")[0]}
        for family, one in found.items()
    }


def _with_refusals(outcome: Mapping[str, Any]) -> str:
    refused = [stage for stage in outcome["problems"] if stage not in ("load", "inject")]
    return ", ".join([outcome["verdict"], *(f"no {stage}" for stage in refused)])


def changes(found: Mapping[str, Mapping[str, Any]], on_record: Verdicts) -> tuple[list[str], list[str]]:
    """What became worse than on record, and what else changed, a line each."""
    worse, other = [], []
    for family, now in verdicts_of(found).items():
        before = on_record.get(family, {})
        for key, verdict in now.items():
            was = before.get(key, "not built")
            if verdict != was:
                text = f"{family}, {key}: {was or 'nothing'} -> {verdict or 'nothing'}"
                (worse if key != "peft" and _is_worse(verdict, was) else other).append(text)
    return worse, other


def _is_worse(verdict: str, was: str) -> bool:
    now, before = ((ORDER.index(text.split(",")[0]), text.count(", no ")) for text in (verdict, was))
    return now > before
