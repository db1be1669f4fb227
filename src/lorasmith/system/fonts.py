"""The language of text in pictures: the user's if a font for it is installed, otherwise English."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from lorasmith.i18n import language, using_language

# Common fonts with Chinese characters on Linux, macOS and Windows, freely licensed ones first.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS", "Microsoft YaHei", "SimHei",
)  # fmt: skip


@contextmanager
def drawable_language() -> Iterator[None]:
    """A context in which messages are in a language that matplotlib can draw, and matplotlib uses a font for it.

    matplotlib must be installed.
    """
    import matplotlib
    from matplotlib import font_manager

    font = chinese_font({entry.name for entry in font_manager.fontManager.ttflist}) if language() == "zh" else None
    family = [font] if font else []
    with (
        matplotlib.rc_context({"font.family": [*family, *matplotlib.rcParams["font.family"]]}),
        using_language("zh" if font else "en"),
    ):
        yield


def chinese_font(installed: Collection[str]) -> str | None:
    """The first font of `CHINESE` that is in `installed`, or None."""
    return next((name for name in CHINESE if name in installed), None)
