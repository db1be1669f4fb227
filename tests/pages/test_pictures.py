"""The pictures of a report: colors of the page, ids of their own, nothing fetched, and texts that fit."""

import re
from dataclasses import replace

import pytest
import torch

from lorasmith.errors import MissingExtraError
from lorasmith.evaluation.trend import trend
from lorasmith.i18n import using_language
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.pages import pictures as module
from lorasmith.pages.pictures import pictures
from lorasmith.runs.evidence import Evidence
from lorasmith.runs.report import RunReport
from tests.support.reports import made_report


@pytest.fixture(scope="module")
def report() -> RunReport:
    return made_report()


def test_there_is_a_picture_of_everything_that_is_known(report):
    assert list(pictures(report)) == ["loss", "intervals", "spectrum", "layers"]
    bare = replace(report, subject=replace(report.subject, training=[], held_out=[]), spectra=[], evidence=Evidence())
    assert pictures(bare) == {}
    one_layer = replace(report, spectra=report.spectra[:1])
    assert "layers" not in pictures(one_layer)


def test_colors_are_the_pages_and_ids_are_its_own(report):
    seen: set[str] = set()
    for picture in pictures(report).values():
        for svg in (picture.wide, picture.narrow):
            assert svg.startswith("<svg role=")
            assert not re.search(r"https?:|#0000|#[0-9a-f]{6}\b(?<!#ffffff)", svg)
            assert "var(--dim)" in svg
            assert re.search(r'<svg [^>]*viewBox="0 0 ', svg)
            assert not re.search(r'<svg [^>]*\b(width|height)="', svg)
            ids = set(re.findall(r' id="([^"]*)"', svg))
            assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) <= ids
            assert not ids & seen
            seen |= ids


def test_the_same_report_has_the_same_pictures(report):
    assert pictures(report) == pictures(report)


def test_a_title_is_read_aloud(report):
    assert 'aria-label="Singular values of every update"' in pictures(report)["spectrum"].wide


def test_pictures_are_in_the_readers_language_if_a_font_can_draw_it(report, monkeypatch):
    english = pictures(report)["intervals"].wide
    with using_language("zh"):
        chinese = pictures(report)["intervals"].wide
        monkeypatch.setattr("lorasmith.system.fonts.chinese_font", lambda installed: None)
        without_font = pictures(report)["intervals"].wide
    glyphs = re.compile(r'id="intervals-(\w+-[0-9a-f]+)"')
    assert set(glyphs.findall(without_font)) == set(glyphs.findall(english))
    if chinese != without_font:  # a machine without a Chinese font draws English
        assert set(glyphs.findall(chinese)) != set(glyphs.findall(english))


def test_experts_and_zero_updates_can_be_drawn(report):
    values = torch.rand(8, 4, dtype=torch.float64).sort(dim=1, descending=True).values
    experts = [LayerSpectrum(f"model.layers.{i}.mlp.experts", values) for i in range(3)]
    zero = LayerSpectrum("model.layers.0.mlp.up_proj", torch.zeros(1, 4, dtype=torch.float64))
    found = pictures(replace(report, spectra=[*experts, zero]))
    assert {"spectrum", "layers"} <= found.keys()


def test_a_short_run_has_no_trend(report):
    assert trend(report.subject.training[:3]) is None
    assert "loss" in pictures(replace(report, end=None))


def test_matplotlib_is_missing(report, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[report\]'"):
        pictures(report)
