"""Text in pictures is in a language that an installed font can draw."""

from types import SimpleNamespace

import pytest

from lorasmith.i18n import language, using_language
from lorasmith.system.fonts import CHINESE, chinese_font, drawable_language

matplotlib = pytest.importorskip("matplotlib")


def test_the_first_known_font_is_taken():
    assert chinese_font({"DejaVu Sans", "SimHei", "Noto Sans CJK SC"}) == "Noto Sans CJK SC" == CHINESE[0]
    assert chinese_font({"DejaVu Sans"}) is None


@pytest.mark.parametrize(
    ("wanted", "installed", "drawn", "first"),
    [("zh", "SimHei", "zh", "SimHei"), ("zh", "DejaVu Sans", "en", None), ("en", "SimHei", "en", None)],
)
def test_the_language_follows_from_the_fonts(monkeypatch, wanted, installed, drawn, first):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [SimpleNamespace(name=installed)])
    before = matplotlib.rcParams["font.family"]
    with using_language(wanted):
        with drawable_language():
            assert language() == drawn
            assert matplotlib.rcParams["font.family"] == [*([first] if first else []), *before]
        assert language() == wanted
    assert matplotlib.rcParams["font.family"] == before
