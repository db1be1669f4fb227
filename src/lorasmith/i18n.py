"""Translation of every text for users: gettext with named placeholders.

Environment variables choose the language, so that child processes use the same; `--lang` only sets one. Help texts
are translated when their modules are imported, so the language must be chosen before that.
"""

import gettext
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

DOMAIN = "lorasmith"
LOCALE = Path(__file__).parent / "locale"
LANGUAGES = ("zh", "en")
VARIABLES = ("LORASMITH_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # the first non-empty one counts

_override: ContextVar[str | None] = ContextVar("spoken", default=None)


def _(text: str, **values: object) -> str:
    """Translate `text` into the user's language, then fill in its `{name}` placeholders."""
    translated = _catalogue(language()).gettext(text)
    return translated.format(**values) if values else translated


def foreign(words: str | None) -> str:
    """Translate a message of Python or the operating system, if the catalogue contains it."""
    return _catalogue(language()).gettext(words) if words else ""


def joined(text: str) -> str:
    """Adapt sentences joined by spaces to the language: Chinese has no spaces between sentences."""
    return re.sub("([。？！；]) +", r"\1", text) if language() == "zh" else text


def listed(words: Iterable[str]) -> str:
    """A list of words with the separator of the language."""
    return _(", ").join(words)


def counted(count: int, one: str, many: str) -> str:
    """`one` if `count` is 1, otherwise `many` with {count} filled in: counted(n, _("1 row"), _("{count} rows"))."""
    return one if count == 1 else many.format(count=f"{count:,}")


def language() -> str:
    """`zh` for any Chinese locale (zh, zh_CN.UTF-8, zh-Hans), `en` for any other."""
    if override := _override.get():
        return override
    wanted = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    known = (word[:2].lower() for word in wanted.split(":"))  # LANGUAGE may list several, in order of preference
    return next((word for word in known if word in LANGUAGES), "en")


@contextmanager
def using_language(wanted: str) -> Iterator[None]:
    """A context in which texts are in the given language, such as for pages that exist in both."""
    before = _override.set(wanted)
    try:
        yield
    finally:
        _override.reset(before)


def translate_argparse() -> None:
    """Make argparse, which uses gettext's default domain, use our catalogue. Global, so only for the command line."""
    os.environ["LANGUAGE"] = language()
    gettext.bindtextdomain(DOMAIN, str(LOCALE))
    gettext.textdomain(DOMAIN)


@cache
def _catalogue(name: str) -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, LOCALE, [name], fallback=True)
