"""What became of a key is said in full sentences, in both languages."""

import re

import pytest

from lorasmith.config.migrate import reasons
from lorasmith.i18n import using_language

VALUES = {
    "count": 16, "file": "F", "first": "a", "folders": "D", "length": 7, "ours": "o", "program": "P", "second": "b",
    "steps": 9, "tracker": "t", "trainer": "T", "used": "u", "variable": "v", "warmup": 2, "where": "W",
}  # fmt: skip


def names(function) -> list[str]:
    """The names of all sentences of a function, from its constants."""
    found = [
        word
        for constant in function.__code__.co_consts
        for word in (constant if isinstance(constant, tuple) else (constant,))
    ]
    return [word for word in found if isinstance(word, str) and re.fullmatch(r"[a-z_]+", word)]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("function", [reasons.unmatched, reasons.refusal])
def test_every_sentence_is_complete(function, language):
    with using_language(language):
        for name in set(names(function)) - VALUES.keys():
            text = function(name, **VALUES)
            assert text.endswith(("." if language == "en" else "。", "FILE.jinja.")), name
            assert not re.search(r"(?<!\{)\{\w+\}(?!\})", text), name
    assert len(names(function)) > 15


@pytest.mark.parametrize("language", ["en", "zh"])
def test_groups_of_keys_have_a_reason(language):
    with using_language(language):
        said = {reasons.no_effect(name, "P") for name in ("always", "default", "files", "inactive", "machine")}
        assert len(said) == 5
