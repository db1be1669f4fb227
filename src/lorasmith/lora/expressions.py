"""Regular expressions that come with an adapter, which must not keep the program busy for ever."""

from collections.abc import Callable
from typing import Any

import regex

from lorasmith.errors import ConfigError
from lorasmith.i18n import _

SECONDS = 2.0  # for one path; a good expression takes microseconds
Match = Any  # as of `re`; the package regex has no types


def full_match(expression: str, path: str) -> Match | None:
    """As `re.fullmatch`. Raises ConfigError if it takes too long."""
    return _within_time(regex.fullmatch, expression, path)


def match(expression: str, path: str) -> Match | None:
    """As `re.match`. Raises ConfigError if it takes too long."""
    return _within_time(regex.match, expression, path)


def _within_time(function: Callable[..., Any], expression: str, path: str) -> Match | None:
    try:
        return function(expression, path, timeout=SECONDS)
    except TimeoutError:
        text = _(
            "the regular expression {expression} takes longer than {seconds:g} s on the module path {path}. Write a "
            "simpler one, without repetitions within repetitions.",
            expression=repr(expression[:100]),
            seconds=SECONDS,
            path=path,
        )
        raise ConfigError(text) from None
