"""Every text that a person reads passes here: gettext with named placeholders, in the language of the user.

The environment decides the language, so that programs started from here speak it too; `--lang` only sets a variable.
Texts of options are made when their modules are imported: a program decides before that.
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
VARIABLES = ("LORASMITH_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is not empty decides

_spoken: ContextVar[str | None] = ContextVar("spoken", default=None)


def _(text: str, **values: object) -> str:
    """The text in the user's language, with `{name}` placeholders filled in after translation."""
    translated = _catalogue(language()).gettext(text)
    return translated.format(**values) if values else translated


def foreign(words: str | None) -> str:
    """What Python or the system said, in the user's language where the catalogue has it, else as it is."""
    return _catalogue(language()).gettext(words) if words else ""


def joined(text: str) -> str:
    """Sentences that were put together with spaces, as the language writes them: Chinese has none between."""
    return re.sub("([。？！；]) +", r"\1", text) if language() == "zh" else text


def listed(words: Iterable[str]) -> str:
    """Words in a row, as the language separates them."""
    return _(", ").join(words)


def counted(count: int, one: str, many: str) -> str:
    """`one` for a single thing, else `many` with its {count}: counted(n, _("1 row"), _("{count} rows"))."""
    return one if count == 1 else many.format(count=f"{count:,}")


def language() -> str:
    """`zh` for every Chinese locale (zh, zh_CN.UTF-8, zh-Hans), `en` for all else."""
    if spoken := _spoken.get():
        return spoken
    wanted = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    known = (word[:2].lower() for word in wanted.split(":"))  # LANGUAGE may list several, the best first
    return next((word for word in known if word in LANGUAGES), "en")


@contextmanager
def speaking(wanted: str) -> Iterator[None]:
    """Within it texts are in this language: for a picture without a font, or documents in both."""
    before = _spoken.set(wanted)
    try:
        yield
    finally:
        _spoken.reset(before)


def lend_to_argparse() -> None:
    """Makes argparse, which asks gettext's default domain, take its words from our catalogue. For a program alone."""
    os.environ["LANGUAGE"] = language()
    gettext.bindtextdomain(DOMAIN, str(LOCALE))
    gettext.textdomain(DOMAIN)


@cache
def _catalogue(name: str) -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, LOCALE, [name], fallback=True)
