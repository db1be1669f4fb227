"""Both languages: who decides, a catalogue that is whole, and screens that are not half in the other language."""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from babel.messages.mofile import read_mo
from tools import catalogue
from tools.foreign import FOREIGN, PLURALS

from lorasmith.i18n import VARIABLES, _, counted, foreign, language, using_language

HAN = re.compile(r"[\u4e00-\u9fff]")


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "fr_FR", "LANGUAGE": "fr:zh:en"}, "zh"),
        ({"LANG": "zh_CN", "LANGUAGE": "en"}, "en"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
        ({"LANG": "zh_CN", "LORASMITH_LANG": "en"}, "en"),
        ({"LANG": "C", "LORASMITH_LANG": "zh"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
    ],
)
def test_the_first_variable_that_is_set_decides(monkeypatch, variables, wanted):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == wanted
    assert _("training") == {"en": "training", "zh": "训练"}[wanted]


def test_the_catalogue_is_whole():
    po = catalogue.read()
    texts = {catalogue._key(message.id) for message in po if message.id}
    assert len(texts) > 450
    assert catalogue.missing(po) == [], "python -m tools.catalogue, then translate these"
    assert texts == {catalogue._key(message.id) for message in catalogue.found() if message.id}, "stale texts"
    assert not [message.id for message in po if message.id and message.fuzzy]
    with catalogue.MO.open("rb") as file:
        assert catalogue.translations(read_mo(file)) == catalogue.translations(po), "python -m tools.catalogue"


def test_a_text_within_another_call_is_found():
    tree = ast.parse('_("a {b}", b=_("inner"))\n_(name)\nother("c")')
    assert list(catalogue.texts(tree)) == ["a {b}", "inner"]


def test_no_text_stands_in_an_f_string():
    """Tools that read texts, ours and a translator's, pass over those."""
    for path in catalogue.SOURCE.rglob("*.py"):
        strings = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.JoinedStr)]
        assert [text for one in strings for text in catalogue.texts(one)] == [], path


@pytest.mark.parametrize(("count", "wanted"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")])
def test_one_is_not_many(count, wanted):
    assert counted(count, _("1 row"), _("{count} rows")) == wanted


def test_every_translation_fills_in_the_same_values():
    foreign_texts = {*FOREIGN, *(one for one, _many in PLURALS)}
    for message in catalogue.read():
        text, translated = catalogue._key(message.id), catalogue._key(message.string)
        if text in foreign_texts:
            signs = r"%(?:\(\w+\))?[rsd]"
            assert sorted(re.findall(signs, text)) == sorted(re.findall(signs, translated)), text
        elif text:
            assert catalogue.placeholders(text) == catalogue.placeholders(translated), text
            assert text[:1].isspace() == translated[:1].isspace() or not text[:1].isspace() or "（" in translated[:2]


def test_a_text_without_translation_and_a_wrong_placeholder_would_be_found():
    po = catalogue.read()
    po["training"].string = ""
    assert catalogue.missing(po) == ["training"]
    assert catalogue.placeholders("{a:.1f} {b!r} {{c}}") == [("a", ".1f", ""), ("b", "", "r")]
    assert catalogue.placeholders("{a}") != catalogue.placeholders("{a:.1f}")


def test_what_the_system_says_is_translated():
    with using_language("zh"):
        assert foreign(os.strerror(2)) == "没有这个文件或文件夹"
        assert foreign("words of a library") == "words of a library"
        assert foreign(None) == ""
    assert foreign(os.strerror(2)) == os.strerror(2)


SCREENS = """
import argparse, sys
from importlib import import_module
from lorasmith.cli import main
main.main(["--lang", "zh"])
for verb in main.verbs():
    parser = import_module("lorasmith.cli." + verb).parser()
    print(parser.format_help())
    for action in parser._actions:
        print("help\\t" + verb + "\\t" + str(action.option_strings or action.dest) + "\\t" + str(action.help))
for words in ("tran", "train x --r", "train x --lr 1", "merge x", "info", "info a b",
              "train x --template chatlm --r a --epochs -1", "train --config /none.toml"):
    main.main(words.split())
"""


def test_no_screen_of_the_command_line_is_half_in_english():
    environment = {**os.environ, "LORASMITH_LANG": "", "LANG": "C.UTF-8", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", SCREENS], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    helps = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("help\t")]
    assert len(helps) > 100
    assert [one for one in helps if not HAN.search(one[2]) and one[1] != "['--device']"] == []
    for words in ("usage", "options", "argument", "(default", "Show this", "required", "error:", " or ", "must be"):
        assert words not in re.sub(r"lorasmith \w+|--[\w-]+|[\w|]+=\w+", "", done.stdout + done.stderr), words
    problems = done.stderr.splitlines()
    assert len(problems) == 10
    assert all(line.startswith("错误：") and len(HAN.findall(line)) > 5 for line in problems), done.stderr


def test_every_sentence_of_argparse_that_a_verb_can_cause_is_ours_to_translate():
    source = Path(argparse.__file__).read_text("utf-8")
    for text in FOREIGN[: FOREIGN.index("unrecognized arguments: %s")]:
        assert text in source or "choose from" in text, text  # the installed Python still says it so
