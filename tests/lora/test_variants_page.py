"""The table of variants in docs/peft.md: its numbers are small, and it notices a difference."""

import re

import pytest

from lorasmith.lora import update
from tests.lora.variants_page import CASES, COLUMNS, END, MARK, PAGES, measured, written
from tests.support.paths import ROOT

LIMIT = 1e-5


@pytest.mark.parametrize("name", ["`use_dora`", "`pissa`", "`target_parameters`"])
def test_the_variant_equals_pefts(name: str) -> None:
    found = measured(CASES[name])
    assert set(found) == set(COLUMNS)
    assert max(found.values()) < LIMIT, found


def test_a_wrong_merge_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = update.Update.merged
    monkeypatch.setattr(update.Update, "merged", lambda self, W_OI: right(self, W_OI) * 1.01)
    assert measured(CASES["LoRA"])["merge"] > 1e-3


@pytest.mark.parametrize("page", PAGES)
def test_the_page_has_a_line_for_each_variant(page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    table = text.split(MARK)[1].split(END)[0]
    numbers = dict(re.findall(r"^\| (.+?) \| \w+ \| (.*) \|$", table, re.MULTILINE))
    assert [name for name in numbers if name not in PAGES[page]] == list(CASES)
    assert all(float(value) < LIMIT for name in CASES for value in numbers[name].split(" | "))


def test_a_page_without_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="variants"):
        written("nothing", [], {})
