"""The table of claims is computed from the results of the studies."""

import json
from dataclasses import replace

import pytest
from tools.quality_claims import ATTENTION, claims

from lorasmith.config.study import RATE
from lorasmith.runs.study.result import combined
from tests.support.studies import made_up

ALL = {"training.method": "lora", "lora.target_modules": "all-linear", "lora.lora_alpha": 32}
OPTIONS = {
    "r8": ALL | {"lora.r": 8},
    "r1": ALL | {"lora.r": 1},
    "attention": {"training.method": "lora", "lora.target_modules": ATTENTION, "lora.r": 21},
    "default": ALL | {"lora.r": 8, "lora.lora_alpha": 16},
    "full": {"training.method": "full"},
    "dora": ALL | {"lora.r": 8, "lora.use_dora": True},
}


def result(losses):
    """As `made_up` has it, with the options of studies/*.toml."""
    made = made_up(losses)
    cells = [
        replace(cell, options=OPTIONS[cell.name.split("_")[0]] | {RATE: cell.options[RATE], "training.seed": cell.seed})
        for cell in made.cells
    ]
    return combined("reviews", "tiny", ("x",), 60, RATE, cells, {}, made.machine).to_json()


def lines(results, language="en"):
    return list(claims(json.loads(json.dumps(results)), language))


def test_each_claim_has_the_figure_of_each_task():
    values = result({
        "r8": {1e-3: [2.1, 2.1, 2.1], 3e-3: [2.0, 2.01, 1.99]},
        "r1": {1e-3: [2.2], 3e-3: [2.1]},
        "attention": {3e-3: [2.04, 2.05, 2.03]},
        "default": {2e-4: [2.4]},
        "dora": {3e-3: [2.0, 2.01, 1.99]},
        "full": {1e-4: [2.02, 2.02, 2.0], 3e-4: [2.5, 2.5, 2.5]},
    })  # fmt: skip
    table = [line.strip("| ").split(" | ") for line in lines({"reviews": values}) if "|" in line]
    keys = ("learns as", "ten times", "rank:", "Rank 1", "Attention", "forgets", "DoRA")
    cell = {key: next(row[1] for row in table if key in row[0]) for key in keys}
    assert cell["learns as"] == "-0.7% [-1.4%, +0.1%]"
    assert cell["ten times"] == "30 (0.003 / 0.0001)"
    assert cell["rank:"] == "1: 0.003, 8: 0.003"
    assert cell["Rank 1"] == "+5.0% (one seed)"
    assert not any("PiSSA" in row[0] or "64 against" in row[0] for row in table)
    assert cell["DoRA"] == "+0.0% [+0.0%, +0.0%]"
    assert cell["Attention"].startswith("+2.0% [")
    assert cell["forgets"] == "+0.050 / +0.050"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_quick_studies_and_no_results_make_no_claim(language):
    assert lines({}, language) == []
    assert lines({"quick-reviews": result({"r8": {1e-3: [2.0]}})}, language) == []
