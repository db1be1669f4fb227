"""Every text that a person reads passes here: gettext with named placeholders."""

import gettext
from pathlib import Path

_catalogue = gettext.translation("lorasmith", Path(__file__).parent / "locale", fallback=True)


def _(text: str, **values: object) -> str:
    """The text in the user's language, with `{name}` placeholders filled in after translation."""
    translated = _catalogue.gettext(text)
    return translated.format(**values) if values else translated
