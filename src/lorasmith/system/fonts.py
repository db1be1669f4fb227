"""Which language the words of a picture can be in: the user's where a font for it is installed, else English."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from lorasmith.i18n import language, speaking

# The usual ones of Linux, macOS and Windows, the freely licensed first.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS", "Microsoft YaHei", "SimHei",
)  # fmt: skip


@contextmanager
def drawable_words() -> Iterator[None]:
    """Within it texts are in a language that matplotlib, which must be installed, has letters for."""
    import matplotlib
    from matplotlib import font_manager

    font = chinese_font({entry.name for entry in font_manager.fontManager.ttflist}) if language() == "zh" else None
    family = [font] if font else []
    with (
        matplotlib.rc_context({"font.family": [*family, *matplotlib.rcParams["font.family"]]}),
        speaking("zh" if font else "en"),
    ):
        yield


def chinese_font(installed: Collection[str]) -> str | None:
    """The best of the fonts that are there; None where no one has Chinese letters."""
    return next((name for name in CHINESE if name in installed), None)
