"""Names and regular expressions of modules. They come with an adapter, so they must not keep the program busy."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import regex

from lorasmith.config.lora import is_name
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

SECONDS = 2.0  # for one path, or for all within `limited_time`; a good expression takes microseconds
Match = Any  # as of `re`; the package regex has no types
Value = TypeVar("Value")
_left: ContextVar[list[float] | None] = ContextVar("seconds that are left for expressions", default=None)


@contextmanager
def limited_time() -> Iterator[None]:
    """Give all expressions inside the block SECONDS together, and not each of them for each path."""
    token = _left.set([SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


def ends_with(path: str, name: str) -> bool:
    """Whether `path` is `name` or ends with its components."""
    return path == name or path.endswith("." + name)


def by_end(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths that end with a name (see `ends_with`), by all such names: there may be many names to look up."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(path)
    return found


def matches(path: str, pattern: str) -> bool:
    """Whether a name or expression matches the module at `path`."""
    return ends_with(path, pattern) if is_name(pattern) else full_match(pattern, path) is not None


def key_matches(key: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches the module at `path`, as in PEFT."""
    return match(rf"(.*\.)?({key})$", path) is not None


def value_for(pattern: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first key of a rank_pattern or alpha_pattern that matches `path`, or the default."""
    return next((value for key, value in pattern.items() if key_matches(key, path)), default)


def full_match(expression: str, path: str) -> Match | None:
    """As `re.fullmatch`. Raises ConfigError if it takes too long."""
    return _within_time(regex.fullmatch, expression, path)


def match(expression: str, path: str) -> Match | None:
    """As `re.match`. Raises ConfigError if it takes too long."""
    return _within_time(regex.match, expression, path)


def _within_time(function: Callable[..., Any], expression: str, path: str) -> Match | None:
    left, began = _left.get() or [SECONDS], time.monotonic()
    try:
        if left[0] > 0:
            return function(expression, path, timeout=left[0])
    except TimeoutError:
        pass
    finally:
        left[0] -= time.monotonic() - began
    text = _(
        "the regular expression {expression} takes longer than {seconds:g} s on the module path {path}. Write a "
        "simpler one, without repetitions within repetitions.",
        expression=repr(expression[:100]),
        seconds=SECONDS,
        path=path,
    )
    raise ConfigError(text)
