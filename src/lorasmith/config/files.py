"""The only readers of JSON and TOML files. Anything wrong with a file becomes one message with its position.

Python's own parsers raise four kinds of exceptions, two of them without a position: ValueError for numbers with too
many digits and RecursionError for deep nesting. They also accept lone surrogates, which tokenizers, files and
terminals reject. A byte order mark, which editors on Windows write, is ignored. Loads no torch.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from lorasmith.errors import ConfigError, LorasmithError, first_line
from lorasmith.i18n import _, foreign

BOM = "\ufeff"
MAX_DEPTH = 200  # of nested lists and objects; code that walks a value recurses as deep
_DECODER = json.JSONDecoder()
# JSON's escapes, in this order: surrogate pairs, lone surrogates (the group), all others.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Malformed(ValueError):
    """Invalid JSON or TOML: the translated reason, and the line and column (counted from 1), if known."""

    def __init__(self, why: str, text: str = "", at: int | None = None) -> None:
        self.why = why.rstrip(".。")
        self.at = at
        self.line = None if at is None else text.count("\n", 0, at) + 1
        self.column = None if at is None else at - text.rfind("\n", 0, at)
        super().__init__(self.why if at is None else _("line {line}, column {column}: {why}", **vars(self)))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises Malformed."""
    text = (_decoded(text) if isinstance(text, bytes) else text).removeprefix(BOM)
    value, end = parse_item(text, len(text) - len(text.lstrip(" \t\n\r")))
    if rest := text[end:].lstrip(" \t\n\r"):
        raise Malformed(_("unexpected text after the value"), text, len(text) - len(rest))
    return value


def parse_item(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that starts at the index `at`, and the index after its end. Raises Malformed."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise Malformed(foreign(error.msg), text, error.pos) from None
    except RecursionError:
        raise Malformed(_("nested too deeply")) from None
    except ValueError:
        raise _too_long(text, at) from None
    if text.count("[", at, end) + text.count("{", at, end) > MAX_DEPTH and _is_deep(value):
        raise Malformed(_("nested too deeply"))
    if _SURROGATE.search(text, at, end):
        for escape in _ESCAPES.finditer(text, at, end):
            if escape[1]:
                raise Malformed(_("{escape} is a lone surrogate, which is not a character", escape=escape[1]), text,
                                escape.start())  # fmt: skip
    return value, end


def read_json(path: Path, error: type[LorasmithError]) -> Any:
    """The value in a JSON file. Raises `error` with the file and, if known, the line."""
    try:
        return parse_json(path.read_bytes())
    except OSError as failure:
        raise error(_unreadable(path, failure)) from None
    except Malformed as failure:
        raise error(_not_json(path, failure)) from None


def read_object(path: Path, error: type[LorasmithError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, also for any other value."""
    return _object(read_json(path, error), path, error)


def read_limited(path: Path, limit: int, error: type[LorasmithError]) -> bytes:
    """The content of a file. Raises `error` if it has more than `limit` bytes."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise error(_("{path}: the file is larger than {mib} MiB.", path=path, mib=limit // 2**20))
    return content


def parse_object(content: bytes, path: Path, error: type[LorasmithError]) -> dict[str, Any]:
    """Like `read_object`, for content that was already read from `path`."""
    try:
        return _object(parse_json(content), path, error)
    except Malformed as failure:
        raise error(_not_json(path, failure)) from None


def _object(value: Any, path: Path, error: type[LorasmithError]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(_not_an_object(path, value))
    return value


def read_objects(path: Path, error: type[LorasmithError]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, without a last line that is still being written. Raises `error`."""
    try:
        *lines, last = path.read_bytes().replace(b"\r\n", b"\n").split(b"\n")
    except OSError as failure:
        raise error(_unreadable(path, failure)) from None
    found = []
    for number, line in enumerate([*lines, last], 1):
        if not line.endswith(b"}"):
            continue
        try:
            found.append(parse_json(line))
        except Malformed as failure:
            if number <= len(lines):
                raise error(_not_json(f"{path}:{number}", Malformed(failure.why))) from None
    return found


def read_text(path: Path, error: type[LorasmithError]) -> str:
    """The text of a file in UTF-8. Raises `error` if it cannot be read."""
    try:
        return path.read_text("utf-8").removeprefix(BOM)
    except OSError as failure:
        raise error(_unreadable(path, failure)) from None
    except UnicodeDecodeError as failure:
        raise error(_not_a_text(path, failure)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file. Raises ConfigError with the file, line and column."""
    text = read_text(path, ConfigError)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        why: object = error
    except RecursionError:
        why = _("nested too deeply")
    except (ValueError, OverflowError) as error:
        found = _too_long(text, 0)
        why = found if found.line else first_line(error)
    raise ConfigError(_("{path}: invalid TOML: {why}", path=path, why=why))


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` deep."""
    level: list[Any] = [value]
    for _depth in range(MAX_DEPTH):
        insides = (
            list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        )
        level = [one for inside in insides for one in inside]
    return any(isinstance(one, dict | list) for one in level)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(_not_utf8(error.start)) from None


def _too_long(text: str, at: int) -> Malformed:
    """The error for a number with more digits than Python converts, which it reports without a position."""
    limit = sys.get_int_max_str_digits()
    digits = re.compile(rf"[\d_]{{{limit + 1},}}").search(text, at)
    return Malformed(_("a number with more than {limit} digits", limit=limit), text, digits.start() if digits else None)


def _not_utf8(at: int) -> str:
    return _("byte {at} is not UTF-8", at=at)


def _unreadable(path: Path, failure: OSError) -> str:
    return _("{path}: cannot be read: {why}", path=path, why=foreign(failure.strerror))


def _not_a_text(path: Path, failure: UnicodeDecodeError) -> str:
    return _("{path}: invalid UTF-8 at byte {at}; save the file as UTF-8", path=path, at=failure.start)


def _not_json(path: Path | str, found: Malformed) -> str:
    return _("{path}: not valid JSON: {error}. Correct the file, or restore it.", path=path, error=found)


def _not_an_object(path: Path, found: object) -> str:
    return _("{path}: must be a JSON object, found {found}.", path=path, found=repr(found)[:40])
