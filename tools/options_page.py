"""Writes docs/options.md and docs/options.zh.md: every verb, flag and key, from the parsers and the configuration.

python -m tools.options_page
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from lorasmith.cli.flags import FLAG_SECTIONS, Parser, default_text, flag_name, kinds_of
from lorasmith.cli.main import verbs
from lorasmith.config.data import DataConfig
from lorasmith.config.toml import SECTIONS, Config, to_toml
from lorasmith.config.values import BOUNDS, bound_text
from lorasmith.i18n import _, using_language
from tools.pages import block, code, notes, places, table, write

PAGES = places("options")
EVERYWHERE = ("help", "lang", "plain")  # flags of every verb
EXAMPLE = Config(data=DataConfig(data=("chats.jsonl",)), output="runs/mine")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def page(language: str) -> str:
    """The whole page in `en` or `zh`."""
    known = notes("options")
    words = known["words"][language]
    with using_language(language):
        lines = [known["head"][language], f"## {words['verbs']}", "", words["everywhere"], ""]
        lines += table(words["flag_head"], map(_flag, _own(_parser("train"), EVERYWHERE)))
        for verb in verbs():
            lines += _verb(_parser(verb), words)
        lines += [f"## {words['keys']}", "", words["about_keys"], ""]
        lines += _section("", {"output": Config.model_fields["output"]}, words)
        for name, section in FLAG_SECTIONS.items():
            lines += _section(name, section.model_fields, words)
        lines += [f"## {words['example']}", "", words["about_example"], "", *block("toml", example())]
        lines += [f"## {words['variables']}", "", words["about_variables"], ""]
        lines += table(
            words["variable_head"], ((code(name), text[language]) for name, text in known["variables"].items())
        )
    return "\n".join(lines).rstrip() + "\n"


def example() -> str:
    """A configuration that says every key, under its help text."""
    kept = {"", *SECTIONS}  # the other sections are flags alone
    shown = {key: _described(field) for key, field in _fields() if key.rpartition(".")[0] in kept}
    return to_toml(EXAMPLE, shown)


def _described(field: FieldInfo) -> str:
    return _(field.description or "")


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field: `output`, then those of the sections."""
    yield "output", Config.model_fields["output"]
    for name, section in FLAG_SECTIONS.items():
        for key, field in section.model_fields.items():
            yield f"{name}.{key}", field


def _parser(verb: str) -> Parser:
    """Made now, so that its words are in the language that is spoken."""
    parser: Parser = import_module(f"lorasmith.cli.{verb}").parser()
    return parser


def _verb(parser: Parser, words: dict[str, str]) -> list[str]:
    """The verb, its own flags, and which sections' flags come with them."""
    lines = [f"### {parser.prog}", "", str(parser.description).replace("%%", "%"), ""]
    lines += block("text", parser.format_usage().split(":", 1)[1].strip())
    own = list(_own(parser))
    if own:
        lines += table(words["flag_head"], map(_flag, own))
    if also := list(_shared(parser, words)):
        lines += [words["also"] + words["comma"].join(also) + words["stop"], ""]
    return lines


def _own(parser: Parser, only: Iterable[str] = ()) -> Iterator[argparse.Action]:
    """Flags and words that are no field of a section; only those of every verb where `only` names them."""
    fields = dict(_fields())
    for action in parser._actions:
        is_own = action.dest not in fields or not str(action.help).startswith(_first_words(fields[action.dest]))
        if action.dest in only if only else is_own and action.dest not in EVERYWHERE:
            yield action


def _first_words(field: FieldInfo) -> str:
    return (field.description or "").replace("%", "%%")  # as flags.add_field writes it, before the language is chosen


def _shared(parser: Parser, words: dict[str, str]) -> Iterator[str]:
    """`[data]` where all flags of the section are there, else those that are."""
    there = {action.dest for action in parser._actions} - {action.dest for action in _own(parser)}
    if "output" in there:
        yield code("--output")
    for name, section in FLAG_SECTIONS.items():
        found = [key for key in section.model_fields if f"{name}.{key}" in there]
        if len(found) == len(section.model_fields):
            yield code(f"[{name}]")
        elif found:
            flags = " ".join(code(flag_name(f"{name}.{key}")) for key in found)
            yield words["of"].format(flags=flags, section=code(f"[{name}]"))


def _flag(action: argparse.Action) -> tuple[str, str]:
    """How it is written, and its help."""
    metavar = str(action.metavar or "")
    shown = [f"{flag} {metavar}".strip() for flag in action.option_strings] or [metavar]
    return ", ".join(map(code, shown)), str(action.help).replace("%%", "%")


def _section(name: str, fields: dict[str, FieldInfo], words: dict[str, str]) -> list[str]:
    """A table of the section's keys."""
    head = f"### [{name}]" if name else f"### {words['top']}"
    note = [] if name in SECTIONS or not name else [words["no_section"][name], ""]
    rows = (
        (code(key), code(_written(f"{name}.{key}", field)), _allowed(field), _default(field), _described(field))
        for key, field in fields.items()
    )
    return [head, "", *note, *table(words["key_head"], rows)]


def _written(key: str, field: FieldInfo) -> str:
    flag = flag_name(key)
    return f"{flag}, --no-{flag[2:]}" if bool in kinds_of(field.annotation) else flag


def _default(field: FieldInfo) -> str:
    return code(text) if (text := default_text(field.default)) else "-"


def _allowed(field: FieldInfo) -> str:
    """Types and literal values, then the bounds, in the words of the errors."""
    found = [text for kind in kinds_of(field.annotation) for text in _type(kind)]
    bounds = [bound_text(name, getattr(one, name)) for one in field.metadata for name in BOUNDS if hasattr(one, name)]
    return ", ".join([_(" or ").join(found), *bounds])


def _type(kind: object) -> list[str]:
    if get_origin(kind) is Literal:
        return [code(str(value)) for value in get_args(kind)]
    if get_origin(kind) is dict:
        return [_("pairs of name=value")]
    return [_("a list") if get_origin(kind) is tuple else _(KINDS[kind])]


if __name__ == "__main__":
    sys.exit(write(PAGES, page))
