"""The plan of the source: few modules outside the rooms, small files, and tests where their module's name says."""

import pytest
from tools.layout import loose, rooms, sources

from tests.support.paths import ROOT

MOST_LOOSE, LONGEST = 8, 400
PACKAGE, TESTS = ROOT / "src" / "lorasmith", ROOT / "tests"

# The modules that only make names available.
ELSEWHERE = {
    "__init__.py": "test_api.py",
    "__main__.py": "cli/test_main.py",
    "peft/__init__.py": "peft/test_refused.py",
}


def place(source: str) -> str:
    """Where the tests of a module are, by its name."""
    folder, _slash, name = source.rpartition("/")
    return "/".join(part for part in (folder, f"test_{name}") if part)


def test_few_modules_are_outside_the_rooms():
    assert len(loose()) <= MOST_LOOSE, loose()


def test_no_file_is_too_long():
    lengths = {str(path): len((PACKAGE / path).read_text("utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_name_says_nothing():
    words = {word for path in sources() for part in path.with_suffix("").parts for word in part.split("_")}
    assert words & {"utils", "util", "helpers", "misc", "common", "legacy", "v2"} == set()


def test_every_module_has_its_tests_where_its_name_says():
    missing = {path.as_posix() for path in sources() if not (TESTS / place(path.as_posix())).is_file()}
    assert missing - ELSEWHERE.keys() == set(), "write tests/" + place("ROOM/MODULE.py")
    assert ELSEWHERE.keys() - missing == set(), "these have their own tests now: take them out of ELSEWHERE"


@pytest.mark.parametrize("source", ELSEWHERE)
def test_a_module_that_is_tested_elsewhere_names_a_file_of_tests(source):
    assert (TESTS / ELSEWHERE[source]).is_file()


def test_the_tests_mirror_the_rooms():
    """Folders of tests are rooms, or hold what is not in the package."""
    folders = {path.name for path in TESTS.iterdir() if (path / "__init__.py").is_file()}
    assert folders - set(rooms()) == {"bench", "docs", "support"}
    assert set(rooms()) - folders == set()
