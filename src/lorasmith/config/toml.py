"""The whole configuration of a run: read from a TOML file and flags, checked, and written back. Loads no torch.

The sections are defined beside this module, with their defaults and help texts; `Config` composes them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorasmith.config.data import DataConfig
from lorasmith.config.files import read_toml
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.preference import METHODS, USED_BY, PreferenceConfig
from lorasmith.config.training import TrainingConfig
from lorasmith.config.values import Typed, check
from lorasmith.i18n import _, listed


class Config(Typed):
    """All options of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    preference: PreferenceConfig = PreferenceConfig()
    output: Annotated[str | None, Field(description=_("Run folder (default: runs/NAME-DATE)"))] = None

    @model_validator(mode="after")
    def _of_method(self) -> Self:
        """Options of preferences need such a method, and such a method knows no other way to learn or to shorten.

        Options of adapters need an adapter. A run's config.toml has them all, so their defaults are accepted.
        """
        method = self.training.method
        if method == "full":
            default = LoraConfig()
            if differing := [key for key, value in self.lora if value != getattr(default, key)]:
                text = _("lora.{key}: training.method is 'full', which trains all weights; remove it", key=differing[0])
                raise ValueError(text)
            if self.model.quantize != "none":
                raise ValueError(
                    _(
                        "model.quantize: quantized weights cannot be trained, but training.method is 'full'; remove "
                        "it, or train an adapter with method 'lora'"
                    )
                )
        for key in self.preference.unused(method):
            methods = listed(USED_BY.get(key, METHODS))
            raise ValueError(
                _(
                    "preference.{key}: used by {methods} only, but training.method is '{method}'; remove it",
                    key=key,
                    method=method,
                    methods=methods,
                )
            )
        if method in METHODS and self.data.learn != "answers":
            raise ValueError(
                _("data.learn: training on preferences ({method}) learns whole answers; remove it", method=method)
            )
        if method in METHODS and self.data.too_long in ("split", "truncate-left"):
            raise ValueError(
                _(
                    "data.too_long: {value!r} does not work for preferences ({method}); use 'truncate' or 'drop'",
                    value=self.data.too_long,
                    method=method,
                )
            )
        return self


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "lora": LoraConfig,
    "training": TrainingConfig,
    "preference": PreferenceConfig,
}


def load_config(path: Path | None, flags: Mapping[str, Any]) -> Config:
    """The values of the file at `path`, overridden by `flags` such as {"lora": {"r": 8}, "output": "runs/x"}.

    Raises ConfigError that lists every problem, one per line.
    """
    values = read_toml(path) if path is not None else {}
    for name, value in flags.items():
        below = values.get(name, {})
        if name not in SECTIONS:
            values[name] = value
        elif isinstance(below, dict):  # otherwise keep the file's `lora = 3`, so that `check` refuses it
            values[name] = {**below, **value}
    return check(Config, values)


def commented_toml(
    config: Config, reasons: Mapping[str, str], sources: Mapping[str, str] | None = None, head: Sequence[str] = ()
) -> str:
    """The configuration as TOML with a comment above every key: its reason, or else its description.

    sources: where values are from, added to the descriptions, by key; head: lines of comment at the top.
    """
    about = {"output": str(Config.model_fields["output"].description)}
    for name, part in SECTIONS.items():
        about |= {f"{name}.{key}": str(field.description) for key, field in part.model_fields.items()}
    about |= reasons
    for key, source in (sources or {}).items():
        about[key] = _("{about} ({source})", about=about[key], source=source)
    return "".join(_plain(line) + "\n" for line in head) + to_toml(config, about)


def to_toml(config: Config, reasons: Mapping[str, str]) -> str:
    """The configuration as TOML, which `load_config` reads back unchanged.

    reasons: comments by key, such as {"model.dtype": "this processor supports bfloat16"}. Each goes above its key; if
        there is no such option ("model.layout"), at the top of the section, or of the file if there is no section.
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
    """The lines of a section. Removes the comments that it uses from `reasons`; None, unknown to TOML, is a comment."""
    lines = []
    for key, value in values.items():
        if (reason := reasons.pop(prefix + key, None)) is not None:
            lines.append(_comment(key, reason))
        lines.append(f"# {key}: not set" if value is None else f"{key} = {_toml(value)}")
    return lines


def _comment(key: str, reason: str) -> str:
    return _plain(f"{key}: {reason}")


def _plain(text: str) -> str:
    """A line of comment."""
    return "# " + re.sub(r"[\x00-\x1f\x7f\s]+", " ", text)


def _toml(value: Any) -> str:
    """One value in TOML syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # TOML uses JSON's escapes, except for DEL
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)  # int and float: 1e-08, inf and nan are TOML too
