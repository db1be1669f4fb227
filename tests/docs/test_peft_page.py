"""docs/peft.md and its Chinese twin: the same shape, links that lead somewhere, and names that are as it says."""

import re

import peft
import pytest
from tools.peft_suite.plugin import FILES

import lorasmith.peft as ours
from lorasmith.errors import ConfigError
from tests.support.paths import ROOT

PAGES = [ROOT / "docs/peft.md", ROOT / "docs/peft.zh.md"]


def test_both_languages_are_of_one_shape() -> None:
    texts = [page.read_text("utf-8").partition("<!-- peft-suite -->")[0] for page in PAGES]
    for shape in (r"^(#+) ", r"^(\|)", r"^(- )", r"`([A-Za-z_.]+)[`(]", r"(\d+e-\d+)"):
        english, chinese = (re.findall(shape, text, re.MULTILINE) for text in texts)
        assert sorted(english) == sorted(chinese), shape


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere_and_every_file_is_there(page) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 3
    assert all((page.parent / link).exists() for link in links)
    files = re.findall(r"`(tests/[^`]+)`", text)
    assert len(files) >= 2
    assert all((ROOT / file).exists() for file in files)
    assert FILES
    assert text.index("<!-- peft-suite -->") < text.index("<!-- /peft-suite -->")


def test_the_import_of_the_page_works_and_what_it_names_as_refused_is() -> None:
    text = PAGES[0].read_text("utf-8")
    line = re.search(r"^from lorasmith\.peft import ([^#]+)#", text, re.MULTILINE)
    assert line is not None
    assert all(hasattr(ours, name.strip()) for name in line[1].split(","))
    for name in re.findall(r"`([A-Za-z_]+)`", text.partition("## What is refused")[2].partition("##")[0]):
        if name in peft.__all__ and name not in ours.__all__:
            with pytest.raises(ConfigError, match=name):
                getattr(ours, name)()
