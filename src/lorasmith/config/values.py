"""What pydantic refuses, in our words: of options, and of the small JSON files that are read back. Loads no torch."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lorasmith.errors import ConfigError
from lorasmith.i18n import _

M = TypeVar("M", bound=BaseModel)
BOUNDS = ("gt", "ge", "lt", "le")  # pydantic's names for them
TOGETHER = {"together": True}  # the context in which a part leaves its problems to who checks the whole


def check(model: type[M], values: Mapping[str, Any], prefix: str = "") -> M:
    """`values` as a `model`; raises ConfigError with a line for each wrong key, named with `prefix` before it."""
    try:
        return model.model_validate(dict(values), context=TOGETHER)
    except ValidationError as error:
        raise ConfigError(*wrong_values(error, model, prefix)) from None


def closest(word: str, known: Iterable[str]) -> str:
    """A " Did you mean 'x'?" to put behind a sentence, or nothing."""
    names, core = list(known), word.strip("-")
    near = [name for name in names if len(core) > 3 and core in name] or get_close_matches(word, names, n=1)
    return " " + _("Did you mean {near!r}?", near=near[0]) if near else ""


def wrong_values(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line for each wrong key: the branches of a union are joined by `or`."""
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
            shown.setdefault(key, detail["input"])
            if (text := _wanted(detail)) not in wanted.setdefault(key, []):
                wanted[key].append(text)
    for key, texts in wanted.items():
        lines.append(
            _(
                "{key}: invalid value {value!r}: must be {wanted}",
                key=key,
                value=shown[key],
                wanted=_(" or ").join(texts),
            )
        )
    return lines


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a model that are models themselves."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _part(model: type[BaseModel], loc: list[str]) -> tuple[type[BaseModel], int]:
    """The section that a place is in, and how deep it is."""
    depth = 0
    while depth < len(loc) and loc[depth] in _sections(model):
        model, depth = _sections(model)[loc[depth]], depth + 1
    return model, depth


def _own_words(key: str, text: str, part: type[BaseModel]) -> str:
    """A validator of a part wrote the sentence; one that begins with its field's name is joined to the section's."""
    names_field = text.split(":")[0] in part.model_fields and not key.endswith(text.split(":")[0])
    return f"{key}{'.' if names_field and key else ': ' if key else ''}{text}"


def _unknown_key(key: str, word: str, part: type[BaseModel], model: type[BaseModel]) -> str:
    """Names the key that was meant: in this section, else in another one."""
    homes = [f"{name}.{word}" for name, other in _sections(model).items() if word in other.model_fields]
    hint = " " + _("Did you mean {near!r}?", near=homes[0]) if homes else closest(word, part.model_fields)
    return _("{key}: unknown key.", key=key) + hint


def _wanted(detail: ErrorDetails) -> str:
    """What pydantic expected, in our words; its own words for a kind that no option of ours has yet."""
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
    """A bound of a number in words; `name` is one of `BOUNDS`."""
    bound = int(bound) if bound == int(bound) else bound
    texts = {
        "gt": _("greater than {bound}", bound=bound),
        "ge": _("at least {bound}", bound=bound),
        "lt": _("less than {bound}", bound=bound),
        "le": _("at most {bound}", bound=bound),
    }
    return texts[name]


def ranges(numbers: Iterable[int]) -> list[range]:
    """The numbers, each once, in ascending runs without a gap: 12, 10, 1, 11 -> 1 and 10 to 12."""
    found: list[range] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def spelled(run: range) -> str:
    """`1`, or `10-12`."""
    return str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}"
