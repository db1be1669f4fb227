"""What README.md and README.zh.md tell people to type exists, and both say the same."""

import ast
import re
import shlex
from importlib import import_module

import pytest
from tools.layout import layers, rooms

from tests.support.paths import ROOT

BOTH = ("README.md", "README.zh.md")
FAR_EAST = re.compile(r"[\u3000-\u9fff\uff00-\uffef]+|What shall I cook today\?")


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def commands(name: str) -> list[list[str]]:
    lines = re.findall(r"^    (lorasmith .*)$", text(name), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("name", BOTH)
def test_every_command_parses(name):
    found = commands(name)
    assert len(found) == 18
    for _program, verb, *words in found:
        _args, problems = import_module(f"lorasmith.cli.{verb}").parser().read(words)
        assert not problems, (verb, words)


@pytest.mark.parametrize("name", BOTH)
def test_every_make_target_and_file_exists(name):
    targets = set(re.findall(r"make ([a-z]+)", text(name)))
    assert {"demo", "test", "bench"} <= targets
    makefile = text("Makefile")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    links = re.findall(r"\]\(([^)]+)\)", text(name))
    assert len(links) >= 9
    for link in links:
        file, _sign, part = link.partition("#")
        assert (ROOT / file).is_file(), link
        assert not part or re.search(rf"^#+ {part}$", text(file), re.MULTILINE | re.IGNORECASE), link


@pytest.mark.parametrize("name", BOTH)
def test_the_python_lines_parse(name):
    (block,) = re.findall(r"```python\n(.*?)```", text(name), re.DOTALL)
    imported = next(node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom))
    assert {alias.name for alias in imported.names} <= set(import_module("lorasmith").__all__)


@pytest.mark.parametrize("name", BOTH)
def test_every_room_of_the_package_is_named_once_from_the_top_down(name):
    """In the order of the layers; on one line of the contract in the order that it has there."""
    named = re.findall(r"^    (\w+)/ ", text(name), re.MULTILINE)
    assert named == [room for layer in layers() for room in layer if room in rooms()]


def test_both_languages_give_the_same_commands_and_figures():
    english, chinese = ([FAR_EAST.sub("", " ".join(words)) for words in commands(name)] for name in BOTH)
    assert english == chinese
    figures = [sorted(re.findall(r"\d+\.\d+", text(name).split("\n## ")[-1])) for name in BOTH]
    assert figures[0] == figures[1]
    assert len(figures[0]) >= 10
