"""Validation with pydantic, with error messages in our own words and in the user's language. Loads no torch.

`check` validates options, `read_back` the small JSON files that lorasmith wrote itself.
"""

import types
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from lorasmith.config.files import parse_json
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
BOUNDS = ("gt", "ge", "lt", "le")  # pydantic's names
COLLECT_PROBLEMS = {"collect": True}  # pydantic context: sections leave it to `check` to report their problems
SHOWN = 80  # characters of an invalid value that a message shows


class CommandLineText(str):
    """A value from the command line, where everything is text; it may stand for a number or a boolean."""

    __slots__ = ()


class Typed(BaseModel):
    """A model that converts no types: `true` is not 1, `"8"` is not 8, 8.0 is not 8. Except `CommandLineText`."""

    unsupported: ClassVar[Collection[str]] = ()  # keys that others know and that are no typing errors

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if not _fits(value, kind):
            raise PydanticCustomError("wrong_kind", "{wanted}", {"wanted": _(" or ").join(_kinds_in_words(kind))})
        return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the annotated type. Types other than text, numbers, lists and dicts are left to pydantic."""
    parts, origin = get_args(kind), get_origin(kind)
    if isinstance(value, CommandLineText):
        return True
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return not isinstance(value, bool | int | float) or any(value is part for part in parts)
    if origin in (list, tuple):
        return not isinstance(value, list | tuple) or all(_fits(one, parts[0]) for one in value)
    if origin is dict:
        return not isinstance(value, dict) or all(_fits(one, parts[1]) for one in value.values())
    plain = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}.get(kind)
    return plain is None or (isinstance(value, plain) and (kind is bool or not isinstance(value, bool)))


def _kinds_in_words(kind: Any) -> list[str]:
    """The types that a field accepts, each in words."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        return _kinds_in_words(parts[0])
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(word for part in parts for word in _kinds_in_words(part)))
    if origin in (list, tuple, dict):
        if origin is dict:
            return [_("pairs of a name and {kind}", kind=_(" or ").join(_kinds_in_words(parts[1])))]
        return [_("a list of whole numbers") if parts[0] is int else _("a list of texts")]
    if origin is Literal:
        return [repr(part) for part in parts]
    plain = {bool: _("true or false"), int: _("a whole number"), float: _("a number"), str: _("text")}
    return [plain[kind]] if kind in plain else []


def check(model: type[M], values: Mapping[str, Any], prefix: str = "") -> M:
    """Validate `values` as a `model`. Raises ConfigError with one line per invalid key, each prefixed with `prefix`."""
    try:
        return model.model_validate(dict(values), context=COLLECT_PROBLEMS)
    except ValidationError as error:
        raise ConfigError(*validation_messages(error, model, prefix)) from None


def read_back(path: Path, kind: type[T]) -> T:
    """Read a small JSON file that lorasmith wrote, as a model, dataclass or dict type.

    Raises OSError, or ValueError with a message for the user.
    """
    content = path.read_bytes().removeprefix(BOM_UTF8)
    parse_json(content)  # for its messages: pydantic's are English
    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    """A message about the first problem."""
    detail = error.errors(include_url=False)[0]
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return _("{key} is missing", key=key)
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    return f"{key}: {detail['msg']}" if key else detail["msg"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, if one of `known` is similar to `word`; otherwise an empty string."""
    names, core = list(known), word.strip("-")
    near = [name for name in names if len(core) > 3 and core in name] or get_close_matches(word, names, n=1)
    return " " + _("Did you mean {near!r}?", near=near[0]) if near else ""


def validation_messages(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One message per invalid key; the alternatives of a union are joined by `or`."""
    lines: list[str] = []
    wanted: dict[str, list[str]] = {}
    shown: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        loc = [str(part) for part in detail["loc"]]
        part, depth = _part(model, loc)
        key = ".".join([prefix] * bool(prefix) + loc[: depth + 1])
        if detail["type"] == "extra_forbidden":
            lines.append(_unknown_key(key, loc[-1], part, model))
        elif detail["type"] == "missing":
            lines.append(_("{key}: required key is missing.", key=".".join([prefix] * bool(prefix) + loc)))
        elif detail["type"] == "value_error":
            lines.append(_own_words(key, str(detail["ctx"]["error"]), part))
        else:
            shown.setdefault(key, _shown(detail["input"]))
            if (text := _wanted(detail)) not in wanted.setdefault(key, []):
                wanted[key].append(text)
    for key, texts in wanted.items():
        lines.append(
            _(
                "{key}: invalid value {value}: must be {wanted}",
                key=key,
                value=shown[key],
                wanted=_(" or ").join(texts),
            )
        )
    return lines


def _shown(value: Any) -> str:
    """The repr of an invalid value, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to format integers of thousands of digits
        return "..."
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a model that are models themselves."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _part(model: type[BaseModel], loc: list[str]) -> tuple[type[BaseModel], int]:
    """The section that contains the location, and its depth."""
    depth = 0
    while depth < len(loc) and loc[depth] in _sections(model):
        model, depth = _sections(model)[loc[depth]], depth + 1
    return model, depth


def _own_words(key: str, text: str, part: type[BaseModel]) -> str:
    """A message of our own validators, prefixed with its key; one that begins with a field name completes the key."""
    names_field = text.split(":")[0] in part.model_fields and not key.endswith(text.split(":")[0])
    return f"{key}{'.' if names_field and key else ': ' if key else ''}{text}"


def _unknown_key(key: str, word: str, part: type[BaseModel], model: type[BaseModel]) -> str:
    """A message about an unknown key that suggests the same key in another section, or a similar one in this."""
    if word in getattr(part, "unsupported", ()):
        return _("{key}: not supported here. Leave it out.", key=key)
    homes = [f"{name}.{word}" for name, other in _sections(model).items() if word in other.model_fields]
    hint = " " + _("Did you mean {near!r}?", near=homes[0]) if homes else did_you_mean(word, part.model_fields)
    return _("{key}: unknown key.", key=key) + hint


def _wanted(detail: ErrorDetails) -> str:
    """What pydantic expected, in our words, or in its own for types that no option uses."""
    kind, ctx = detail["type"], detail.get("ctx", {})
    if (name := next((name for name in BOUNDS if name in ctx), None)) is not None:
        return bound_text(name, ctx[name])
    whole = {
        "literal_error": str(ctx.get("expected")).replace(" or ", _(" or ")),
        "dict_type": _("pairs of name=value"),
        "finite_number": _("a finite number"),
        "too_short": _("a non-empty list"),
    }
    if kind in whole:
        return whole[kind]
    kinds = {
        "int": _("a whole number"),
        "float": _("a number"),
        "bool": _("true or false"),
        "string": _("text"),
        "list": _("a list"),
        "tuple": _("a list"),
        "model": _("a section with keys"),
    }
    return kinds.get(kind.split("_")[0], detail["msg"])


def bound_text(name: str, bound: float) -> str:
    """The bound of a number in words; `name` is one of `BOUNDS`."""
    bound = int(bound) if bound == int(bound) and abs(bound) < 1e15 else bound
    texts = {
        "gt": _("greater than {bound}", bound=bound),
        "ge": _("at least {bound}", bound=bound),
        "lt": _("less than {bound}", bound=bound),
        "le": _("at most {bound}", bound=bound),
    }
    return texts[name]


def ranges(numbers: Iterable[int]) -> list[range]:
    """The distinct numbers as ascending ranges without gaps: 12, 10, 1, 11 become 1 and 10 to 12."""
    found: list[range] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def range_text(numbers: range) -> str:
    """The range as text: `1` or `10-12`."""
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start}-{numbers.stop - 1}"
