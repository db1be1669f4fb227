"""The whole configuration of a run: every part's options, from a TOML file and from flags. Loads no torch.

Each part's config.py owns its defaults and help texts; this file composes them, checks them once, and writes them.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lorasmith.data.config import DataConfig
from lorasmith.errors import ConfigError
from lorasmith.i18n import _, foreign
from lorasmith.lora.config import LoraConfig
from lorasmith.model.config import ModelConfig
from lorasmith.training.config import TrainingConfig

M = TypeVar("M", bound=BaseModel)


class Config(BaseModel):
    """Everything that decides a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    output: Annotated[str | None, Field(description=_("folder of the run; runs/NAME-DATE where not given"))] = None


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "lora": LoraConfig,
    "training": TrainingConfig,
}
BOUNDS = ("gt", "ge", "lt", "le")  # pydantic's names for them


def load_config(path: Path | None, flags: Mapping[str, Any]) -> Config:
    """The file's values with `flags` over them ({"lora": {"r": 8}, "output": "runs/x"}), checked once.

    Raises ConfigError that holds every problem, one a line.
    """
    values = read_toml(path) if path is not None else {}
    for name, value in flags.items():
        below = values.get(name, {})
        if name not in SECTIONS:
            values[name] = value
        elif isinstance(below, dict):  # else the file's `lora = 3` stays, to be refused
            values[name] = {**below, **value}
    return check(Config, values)


def check(model: type[M], values: Mapping[str, Any], prefix: str = "") -> M:
    """`values` as a `model`; raises ConfigError with a line for each wrong key, named with `prefix` before it."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(*_problems(error, model, prefix)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; raises ConfigError that names the file, the line and the column."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(_("{path}: cannot be read: {why}", path=path, why=foreign(error.strerror))) from None
    except UnicodeDecodeError as error:
        raise ConfigError(_("{path}: byte {at} is no UTF-8; save it as UTF-8", path=path, at=error.start)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_("{path}: no valid TOML: {why}", path=path, why=error)) from None


def closest(word: str, known: Iterable[str]) -> str:
    """A " Did you mean 'x'?" to put behind a sentence, or nothing."""
    names, core = list(known), word.strip("-")
    near = [name for name in names if len(core) > 3 and core in name] or get_close_matches(word, names, n=1)
    return " " + _("Did you mean {near!r}?", near=near[0]) if near else ""


def _problems(error: ValidationError, model: type[BaseModel], prefix: str) -> list[str]:
    """One line for each wrong key: the branches of a union are joined by `or`."""
    lines: list[str] = []
    wanted: dict[str, list[str]] = {}
    shown: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        loc = [str(part) for part in detail["loc"]]
        depth = 2 if model is Config and loc and loc[0] in SECTIONS else 1
        key = ".".join([prefix] * bool(prefix) + loc[:depth])
        if detail["type"] == "extra_forbidden":
            lines.append(_unknown_key(key, loc, model))
        elif detail["type"] == "value_error":
            lines.append(_own_words(key, str(detail["ctx"]["error"]), model, loc))
        else:
            shown.setdefault(key, detail["input"])
            if (text := _wanted(detail)) not in wanted.setdefault(key, []):
                wanted[key].append(text)
    for key, texts in wanted.items():
        lines.append(
            _(
                "{key}: {value!r} is not allowed: must be {wanted}",
                key=key,
                value=shown[key],
                wanted=_(" or ").join(texts),
            )
        )
    return lines


def _own_words(key: str, text: str, model: type[BaseModel], loc: list[str]) -> str:
    """A validator of a part wrote the sentence; one that begins with its field's name is joined to the section's."""
    part = SECTIONS[loc[0]] if model is Config and loc and loc[0] in SECTIONS else model
    names_field = text.split(":")[0] in part.model_fields and not key.endswith(text.split(":")[0])
    return f"{key}{'.' if names_field and key else ': ' if key else ''}{text}"


def _unknown_key(key: str, loc: list[str], model: type[BaseModel]) -> str:
    """Names the key that was meant: in this section, else in another one."""
    if model is not Config:
        return _("{key}: no such key.", key=key) + closest(loc[-1], model.model_fields)
    here = SECTIONS[loc[0]] if len(loc) > 1 else Config
    homes = [f"{name}.{loc[-1]}" for name, part in SECTIONS.items() if loc[-1] in part.model_fields]
    hint = " " + _("Did you mean {near!r}?", near=homes[0]) if homes else closest(loc[-1], here.model_fields)
    return _("{key}: no such key.", key=key) + hint


def _wanted(detail: ErrorDetails) -> str:
    """What pydantic expected, in our words; its own words for a kind that no option of ours has yet."""
    kind, ctx = detail["type"], detail.get("ctx", {})
    if (name := next((name for name in BOUNDS if name in ctx), None)) is not None:
        return bound_text(name, ctx[name])
    whole = {
        "literal_error": str(ctx.get("expected")).replace(" or ", _(" or ")),
        "dict_type": _("pairs of name=value"),
        "finite_number": _("a finite number"),
    }
    if kind in whole:
        return whole[kind]
    kinds = {
        "int": _("a whole number"),
        "float": _("a number"),
        "bool": _("true or false"),
        "string": _("text"),
        "tuple": _("a list"),
        "model": _("a section of keys"),
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


def to_toml(config: Config, reasons: Mapping[str, str]) -> str:
    """The configuration as a TOML file that load_config reads back equal.

    `reasons` ("model.dtype": "this CPU computes float32 fastest") stand as comments above their keys; one whose key is
    no option ("model.layout") stands at the head of its section, one without a section at the head of the file.
    """
    left = dict(reasons)
    output = _entries({"output": config.output}, "", left)
    body: list[str] = []
    for name in SECTIONS:
        entries = _entries(dict(getattr(config, name)), f"{name}.", left)
        facts = [key for key in left if key.startswith(f"{name}.")]
        body += ["", f"[{name}]", *(_comment(key, left.pop(key)) for key in facts), *entries]
    head = [_comment(key, reason) for key, reason in left.items()]
    return "\n".join([*head, *output, *body]) + "\n"


def _entries(values: dict[str, Any], prefix: str, reasons: dict[str, str]) -> list[str]:
    """`key = value` lines under their reasons, which leave `reasons`; TOML has no null, so None is a comment."""
    lines = []
    for key, value in values.items():
        if (reason := reasons.pop(prefix + key, None)) is not None:
            lines.append(_comment(key, reason))
        lines.append(f"# {key}: not set" if value is None else f"{key} = {_toml(value)}")
    return lines


def _comment(key: str, reason: str) -> str:
    return "# " + re.sub(r"[\x00-\x1f\x7f\s]+", " ", f"{key}: {reason}")


def _toml(value: Any) -> str:
    """One value in TOML's writing."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # JSON's escapes are TOML's, but for DEL
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)  # int and float: 1e-08, inf and nan are TOML too
