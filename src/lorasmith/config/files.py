"""The one reader of JSON and the one of TOML: whatever is wrong with a text is a sentence that says where. No torch.

Python's own readers raise four kinds of errors, two of them without a place: for numbers too long to convert
(ValueError) and for brackets nested too deeply (RecursionError). They also let half a character (a lone surrogate)
through, which no tokenizer, file or terminal takes. A byte order mark, which Windows' editors write, is passed over.
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
DEEPEST = 200  # lists and objects within each other; whatever reads a value later goes as deep
_DECODER = json.JSONDecoder()
# Escapes of JSON one after another: pairs of halves, then halves alone (the group), then all others.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Malformed(ValueError):
    """A text that is not what it should be: `why` in the user's words; `line` and `column` where they are known."""

    def __init__(self, why: str, text: str = "", at: int | None = None) -> None:
        self.why = why.rstrip(".。")
        self.at = at
        self.line = None if at is None else text.count("\n", 0, at) + 1
        self.column = None if at is None else at - text.rfind("\n", 0, at)
        super().__init__(self.why if at is None else _("line {line}, column {column}: {why}", **vars(self)))


def parse_json(text: str | bytes) -> Any:
    """The value that a whole text holds. Raises Malformed."""
    text = (_decoded(text) if isinstance(text, bytes) else text).removeprefix(BOM)
    value, end = parse_item(text, len(text) - len(text.lstrip(" \t\n\r")))
    if rest := text[end:].lstrip(" \t\n\r"):
        raise Malformed(_("something follows after the value"), text, len(text) - len(rest))
    return value


def parse_item(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends. Raises Malformed."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise Malformed(foreign(error.msg), text, error.pos) from None
    except RecursionError:
        raise Malformed(_("nested too deeply")) from None
    except ValueError:
        raise _too_long(text, at) from None
    if text.count("[", at, end) + text.count("{", at, end) > DEEPEST and _is_deep(value):
        raise Malformed(_("nested too deeply"))
    if _HALF.search(text, at, end):
        for escape in _ESCAPES.finditer(text, at, end):
            if escape[1]:
                raise Malformed(_("{escape} is half a character (a lone surrogate)", escape=escape[1]), text,
                                escape.start())  # fmt: skip
    return value, end


def read_json(path: Path, error: type[LorasmithError]) -> Any:
    """The value in a file. Raises `error`, which names the file and, where it is known, the line."""
    try:
        return parse_json(path.read_bytes())
    except OSError as failure:
        raise error(_("{path}: cannot be read: {why}", path=path, why=foreign(failure.strerror))) from None
    except Malformed as failure:
        raise error(_not_json(path, failure)) from None


def read_object(path: Path, error: type[LorasmithError]) -> dict[str, Any]:
    """The object in a file, which may hold nothing else. Raises `error`."""
    return _object(read_json(path, error), path, error)


def parse_object(content: bytes, path: Path, error: type[LorasmithError]) -> dict[str, Any]:
    """The object in the content of a file that was read from `path`. Raises `error`, as `read_object` does."""
    try:
        return _object(parse_json(content), path, error)
    except Malformed as failure:
        raise error(_not_json(path, failure)) from None


def _object(value: Any, path: Path, error: type[LorasmithError]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(_not_an_object(path, value))
    return value


def read_objects(path: Path, error: type[LorasmithError]) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, without a last line that is still being written. Raises `error`."""
    try:
        text = path.read_text("utf-8")
    except OSError as failure:
        raise error(_("{path}: cannot be read: {why}", path=path, why=foreign(failure.strerror))) from None
    except UnicodeDecodeError as failure:
        raise error(_not_json(path, Malformed(_not_utf8(failure.start)))) from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also breaks within texts, at U+2028
        if not line.endswith("}"):
            continue
        try:
            found.append(parse_json(line))
        except Malformed as failure:
            raise error(_not_json(f"{path}:{number}", Malformed(failure.why))) from None
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; raises ConfigError that names the file, the line and the column."""
    try:
        text = path.read_text("utf-8").removeprefix(BOM)
    except OSError as error:
        raise ConfigError(_("{path}: cannot be read: {why}", path=path, why=foreign(error.strerror))) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            _("{path}: invalid UTF-8 at byte {at}; save the file as UTF-8", path=path, at=error.start)
        ) from None
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
    """Whether lists and objects lie more than `DEEPEST` within each other."""
    level: list[Any] = [value]
    for _depth in range(DEEPEST):
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
    """For a ValueError without a place: Python converts whole numbers up to a limit, for the time that they take."""
    limit = sys.get_int_max_str_digits()
    digits = re.compile(rf"[\d_]{{{limit + 1},}}").search(text, at)
    return Malformed(_("a number of more than {limit} digits", limit=limit), text, digits.start() if digits else None)


def _not_utf8(at: int) -> str:
    return _("byte {at} is not UTF-8", at=at)


def _not_json(path: Path | str, found: Malformed) -> str:
    return _("{path}: not valid JSON: {error}. Correct the file, or restore it.", path=path, error=found)


def _not_an_object(path: Path, found: object) -> str:
    return _("{path}: must be a JSON object, found {found}.", path=path, found=repr(found)[:40])
