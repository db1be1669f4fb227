"""docs/performance.md says which families run fast in every part: from what `enable_fast_parts` finds on tiny models.

`python tests/docs/test_performance_page.py` writes the table anew.
"""

import re
import sys

import pytest
import torch

from tests.support.families import CONFIGS, PADDED
from tests.support.fast_base import SMOLLM3, fast_base
from tests.support.paths import ROOT

PAGES = tuple(ROOT / "docs" / name for name in ("performance.md", "performance.zh.md"))
BEGIN, END = "<!-- families -->", "<!-- /families -->"
NAMED = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt2", "olmo2", "granite", "smollm3")
FAMILIES = tuple(dict.fromkeys((*NAMED, *CONFIGS)))
PARTS = ("attention", "head", "linear layers", "MLPs", "norms", "prefix", "rotary")


def line(family: str) -> str:
    """The family's row of the table."""
    base, _adapter = fast_base(family, torch.float32)
    assert base.fast_parts <= set(PARTS)
    fast, plain = ([p for p in PARTS if (p in base.fast_parts) == is_fast] for is_fast in (True, False))
    return f"| {family} | {', '.join(fast)} | {', '.join(plain) or '-'} |"


def table() -> str:
    """The whole of it, in Markdown."""
    head = ["| family | parts that run fast | parts left plain |", "| --- | --- | --- |"]
    return "\n".join([*head, *map(line, FAMILIES)])


def between(text: str) -> str:
    """What stands between the markers."""
    found = re.fullmatch(f".*{BEGIN}\n\n(.*)\n\n{END}.*", text, re.DOTALL)
    assert found, f"no lines {BEGIN} and {END}"
    return found[1]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """The rows of the table."""
    return between(PAGES[0].read_text("utf-8")).splitlines()[2:]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_runs_fast(family: str, lines: list[str]) -> None:
    assert line(family) in lines, "python tests/docs/test_performance_page.py"


def test_the_page_has_these_families_and_no_other(lines: list[str]) -> None:
    assert [row.split(" | ")[0].removeprefix("| ") for row in lines] == list(FAMILIES)
    assert set(FAMILIES) == {*CONFIGS, *SMOLLM3}


def test_both_languages_have_the_same_tables_and_figures() -> None:
    english, chinese = (page.read_text("utf-8") for page in PAGES)
    assert between(english) == between(chinese)
    for shape in (r"<!-- bench -->.*<!-- /bench -->", r"^#+ ", r"^(?:- |\d+\. )", r"(?<![\d.,])\d+\.\d+"):
        found = [sorted(re.findall(shape, text, re.MULTILINE | re.DOTALL)) for text in (english, chinese)]
        assert found[0] == found[1], shape


def test_every_packed_family_attends_by_hand_and_shares_prefixes(lines: list[str]) -> None:
    for family, row in zip(FAMILIES, lines, strict=True):
        fast = row.split(" | ")[1].split(", ")
        assert {"head", "linear layers"} <= set(fast)
        assert ("attention" in fast) == ("prefix" in fast) == (family not in PADDED)


def main() -> None:
    """Write the table into both pages."""
    made = table()
    for page in PAGES:
        before, rest = page.read_text("utf-8").split(BEGIN)
        _old, after = rest.split(END)
        page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", "utf-8")
        sys.stdout.write(f"{page}\n")


if __name__ == "__main__":
    main()
