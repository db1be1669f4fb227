"""Command-line flags generated from the fields of the configuration, which define every name, default and help text.

The parser does not convert types: the configuration validates the file and the flags together, so that all problems
are reported at once. Loads no torch.
"""

import argparse
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorasmith.cli.wrap import HelpFormatter
from lorasmith.config.combine import CombineConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingFlags
from lorasmith.config.serving import ServeConfig
from lorasmith.config.toml import SECTIONS, Config, load_config
from lorasmith.config.values import CommandLineText, check, did_you_mean
from lorasmith.errors import ConfigError
from lorasmith.i18n import _

Group = argparse._ArgumentGroup
FLAG_SECTIONS: dict[str, type[BaseModel]] = {
    **SECTIONS,
    "sampling": SamplingFlags,
    "serve": ServeConfig,
    "combine": CombineConfig,
}


# Flags that do not have the name of their key.
FLAG_NAMES = {"training.start_from": "--from"}


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of exiting, and accepts no abbreviated flags."""

    def __init__(self, verb: str, words: str, about: str) -> None:
        super().__init__(
            prog=f"lorasmith {verb}",
            usage=" ".join(["%(prog)s", *words.split(), _("[options]")]),
            description=about.replace("%", "%%"),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.own = self.add_argument_group(_("options"))
        self.own.add_argument("-h", "--help", action="help", help=_("Show this help message"))
        # cli/main.py handles these two before it imports a command; here they serve --help and `did_you_mean`
        self.own.add_argument("--lang", metavar="zh|en", help=_("Display language (default: from LANG)"))
        self.add_switch("--plain", _("Plain output for screen readers: no bars, boxes or colors; one fact per line"))

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message and a hint at --help."""
        raise ConfigError(_("{message} (see {prog} --help)", message=message, prog=self.prog))

    def add_section(self, name: str, only: Collection[str] | None = None) -> None:
        """Add a flag for every field of a section, or only for those in `only`. The flag's dest is `name.field`."""
        group = self.add_argument_group(f"[{name}]")
        for key, field in FLAG_SECTIONS[name].model_fields.items():
            if only is None or key in only:
                add_field(group, f"{name}.{key}", field)

    def add_switch(self, flag: str, text: str) -> None:
        """Add a flag without a value."""
        self.own.add_argument(flag, action="store_true", help=text)

    def add_json(self) -> None:
        """Add --json, which moves all other output to standard error."""
        self.add_switch("--json", _("Print the result as one JSON object on the last line of standard output"))

    def add_html(self) -> None:
        """Add --html, which `html_path` reads."""
        self.own.add_argument("--html", metavar="FILE", help=_("Also write the results to a self-contained HTML file"))

    def add_base(self) -> None:
        """Add the flags of the base model, for commands that otherwise load the one that the adapter names."""
        text = _("Base model to use instead of the one named in the adapter")
        self.own.add_argument("--model", dest="model.model", metavar="TEXT", default=argparse.SUPPRESS, help=text)
        self.add_section("model", only=("dtype", "quantize", "device", "trust_remote_code"))

    def add_config(self) -> None:
        """Add --config, --output and the flags of every section."""
        self.own.add_argument(
            "--config", metavar="FILE", help=_("TOML configuration file; command-line options override it")
        )
        add_field(self.own, "output", Config.model_fields["output"])
        for name in SECTIONS:
            self.add_section(name)

    def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse `argv`. Returns the arguments, and one message per unknown flag or unexpected argument."""
        args, rest = self.parse_known_intermixed_args(argv)  # parse_known_args fails on `--output RUN DATA...`
        known = [flag for action in self._actions for flag in action.option_strings]
        unknown = [word.split("=")[0] for word in rest if word.startswith("-")]
        problems = [_("unknown option {flag}.", flag=flag) + did_you_mean(flag, known) for flag in unknown]
        return args, problems or [_("unexpected argument {word!r}", word=word) for word in rest]


def positive(text: str) -> int:
    """An argparse type for a whole number above 0, for flags that are not fields of the configuration."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(_("invalid value {word!r}: must be a whole number above 0", word=text))
    return int(text)


def add_field(group: Group, key: str, field: FieldInfo) -> None:
    """Add the flag of one field."""
    flag = flag_name(key)
    default = default_text(field.default)
    text = (field.description or "") + (_(" (default: {default})", default=default) if default else "")
    kinds = kinds_of(field.annotation)
    more: dict[str, Any]
    if bool in kinds:
        more = {"action": argparse.BooleanOptionalAction}
    else:
        more = {"metavar": _metavar(kinds)} | ({"nargs": "+", "action": "extend"} if _is_many(kinds) else {})
    group.add_argument(flag, dest=key, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **more)


def flag_name(key: str) -> str:
    """The flag of a key such as 'training.seed': usually its last part with dashes."""
    return FLAG_NAMES.get(key, "--" + key.split(".")[-1].replace("_", "-"))


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by section: {"lora": {"r": "8"}, "output": "runs/x"}."""
    values: dict[str, Any] = {}
    for key, value in vars(args).items():
        section, dot, name = key.partition(".")
        if dot:
            field = FLAG_SECTIONS[section].model_fields[name]
            values.setdefault(section, {})[name] = _value(kinds_of(field.annotation), value)
        elif key == "output":
            values[key] = value
    if files := getattr(args, "files", None):
        section_data = values.setdefault("data", {})
        section_data["data"] = [*files, *section_data.get("data", [])]
    return values


def config_of(args: argparse.Namespace) -> Config:
    """The configuration of --config, overridden by the flags. Raises ConfigError that lists every problem."""
    return load_config(Path(args.config) if args.config else None, given(args))


def config_problems(args: argparse.Namespace) -> tuple[str, ...]:
    """The problems of the given values, to report them along with unknown flags."""
    try:
        if "config" in args:
            config_of(args)
    except ConfigError as error:
        return error.problems
    return ()


def kinds_of(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without None."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    plain = (get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)
    return [part for part in plain if part is not type(None)]


def _is_many(kinds: list[Any]) -> bool:
    return any(get_origin(kind) in (tuple, dict) for kind in kinds)


def _value(kinds: list[Any], value: Any) -> Any:
    """A flag's value in the form that its field expects. Invalid values are left to the validation."""
    if isinstance(value, str):
        value = CommandLineText(value)
    elif isinstance(value, list):
        value = [CommandLineText(word) for word in value]
    if isinstance(value, list) and str in kinds and len(value) == 1:
        return value[0]  # a single value may be a regular expression; several are names
    if isinstance(value, list) and any(get_origin(kind) is dict for kind in kinds):
        return _pairs(kinds, value)
    if float in kinds and str in kinds:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _pairs(kinds: list[Any], words: list[str]) -> Any:
    """The NAME=VALUE words as a dict, or the words unchanged if one is not of that form.

    If all values are numbers, NAME may be a regular expression that contains `=`, so split at the last one. If they may
    be text, VALUE may contain `=`, so split at the first one.
    """
    is_number = any(get_args(kind)[1] in (int, float) for kind in kinds if get_origin(kind) is dict)
    pairs = [word.rpartition("=") if is_number else word.partition("=") for word in words]
    if not all(name and equals for name, equals, _text in pairs):
        return words
    return {name: CommandLineText(text) for name, _equals, text in pairs}


def _metavar(kinds: list[Any]) -> str:
    names = {int: "N", float: "X", str: "TEXT"}
    words: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [str(value) for value in get_args(kind)]
        elif get_origin(kind) is dict:
            words.append("NAME=" + names.get(get_args(kind)[1], "VALUE"))
        else:
            words.append(names[get_args(kind)[0] if get_origin(kind) is tuple else kind])
    return "|".join(dict.fromkeys(words))


def default_text(value: Any) -> str:
    """A default as the user would type it; empty if there is none, because the help text then explains it."""
    if value is None or value == () or value == {}:
        return ""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def html_path(args: argparse.Namespace) -> Path | None:
    """The path of --html, or None. Raises ConfigError if its folder does not exist, before minutes are spent."""
    if args.html is None:
        return None
    path = Path(args.html).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(_("--html {file}: must be a file in an existing folder, such as report.html", file=args.html))
    return path


def base_of(args: argparse.Namespace) -> ModelConfig:
    """The options of the base model from --model, --dtype and so on; only the given ones are set."""
    return check(ModelConfig, given(args).get("model", {}), "model")
