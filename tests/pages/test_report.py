"""The page of a report: one file with every figure, in both languages, that fits a phone, a desk and paper."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.evaluation.interval import Interval
from lorasmith.i18n import using_language
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.pages.report import kind_rows, render_page, write_page
from lorasmith.runs.evidence import Evidence
from lorasmith.runs.findings import Finding
from lorasmith.runs.full_finding import full_finding
from lorasmith.runs.report import RunReport
from lorasmith.runs.whole_update import WholeUpdate
from tests.support.html_page import Page
from tests.support.reports import TAGS, made_report

HIDDEN = ("style", "svg")  # whose text no reader reads
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def report() -> RunReport:
    return made_report()


def test_everything_is_on_the_page_and_nothing_is_fetched(report):
    html = render_page(report)
    page = Page(html, HIDDEN)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "script" not in page.seen
    assert "<b>" not in html
    for finding in report.findings.values():
        assert page.text.count(finding.answer) == 2  # at a glance, and with its evidence
        assert all(line in page.text for line in finding.evidence)
    for step in report.steps:
        assert step.what in page.text
        assert step.command in page.text
    assert all(text in page.text for text in report.problems)
    for example in report.evidence.shown:
        assert example.prompt.text in page.text
        assert example.base.text in page.text
    assert page.text.count("(empty)") == 3
    assert page.text.count("truncated at the length limit") == 3
    assert "Of the 40 held-out examples" in page.text
    assert TAGS in page.text
    assert page.seen.count("svg") == 8


def test_the_page_is_in_the_readers_language(report):
    with using_language("zh"):
        html = render_page(report)
        text = Page(html, HIDDEN).text
    assert '<html lang="zh">' in html
    for word in ("训练报告", "学到东西了吗？", "LoRA 够用吗？", "接下来可以试什么", "最差", "有效秩"):
        assert word in text
    assert '<html lang="en">' in render_page(report)


def test_a_run_of_all_weights_has_its_own_question(report):
    config = report.subject.config
    full = config.model_copy(update={"training": config.training.model_copy(update={"method": "full"})})
    values = report.spectra[0].values_ES
    update = WholeUpdate(
        (
            LayerSpectrum("model.layers.0.mlp.up_proj", values),
            LayerSpectrum("model.layers.1.mlp.up_proj", values, rest=9),
        ),
        {64: Interval(0.95, 0.93, 0.97, 40)},
    )
    findings = {key: one for key, one in report.findings.items() if key != "rank"} | {"full": full_finding(update, ())}
    subject = replace(report.subject, config=full)
    whole = replace(report, subject=subject, findings=findings, spectra=[*update.spectra])
    html = render_page(whole)
    text = Page(html, HIDDEN).text
    assert text.count("Was full fine-tuning needed?") == 3
    assert "Was LoRA enough?" not in text
    assert "Probably not: cut to rank 64" in text
    assert "effective rank" not in text
    assert "3 (2-≥5)" in text
    assert "W - W0" in text
    assert 'class="cards five"' in html
    assert Page(html, HIDDEN).seen.count("svg") == 6  # none of the effective rank by layer
    study = Finding("study", "best", "It is the best.", ("The page of the study: s.html",), "likely", "good")
    more = render_page(replace(whole, findings=findings | {"study": study}))
    assert 'class="cards"' in more
    assert Page(more, HIDDEN).text.count("It is the best.") == 2


def test_what_is_not_known_is_said(report):
    bare = replace(report, evidence=Evidence(), spectra=[], steps=[], problems=(), facts=[])
    text = Page(render_page(bare), HIDDEN).text
    assert "Nothing is called for" in text
    assert "Answers side by side" not in text
    assert "directions for 90%" not in text
    alone = replace(bare, subject=replace(report.subject, config=None, state="adapter"))
    text = Page(render_page(alone), HIDDEN).text
    assert "An adapter folder without its run" in text
    assert "Nothing is called for" not in text
    unfinished = replace(bare, subject=replace(report.subject, state="interrupted"))
    assert "after step 60" in Page(render_page(unfinished), HIDDEN).text


def test_a_row_for_each_kind_of_module(report):
    up, query = sorted(kind_rows(report.spectra), key=lambda row: row.kind)
    assert (up.kind, query.kind, up.updates, up.rank) == ("mlp.up_proj", "self_attn.q_proj", 3, "4")
    assert up.directions == "2"
    assert up.norm == "2.3 (1.15-3.45)"
    assert up.effective == "3.0"


def test_the_page_is_written_whole(report, tmp_path):
    write_page(report, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text("utf-8") == render_page(report)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_the_page_fits_a_phone_a_desk_and_paper(report, tmp_path: Path):
    sync_api = pytest.importorskip("playwright.sync_api")
    for language in ("en", "zh"):
        with using_language(language):
            write_page(report, tmp_path / f"{language}.html")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for language in ("en", "zh"):
            for width, shown in ((390, "narrow"), (1280, "wideonly")):
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.goto((tmp_path / f"{language}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.locator(f"figure .{shown}").first.is_visible()
                other = "wideonly" if shown == "narrow" else "narrow"
                assert not page.locator(f"figure .{other}").first.is_visible()
                page.close()
        page = browser.new_page(color_scheme="dark")
        page.goto((tmp_path / "en.html").as_uri())
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.pdf(path=tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 10_000
        browser.close()
