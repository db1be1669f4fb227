"""CONTRIBUTING.md describes the code as it is: the picture of the layers, the rooms, and files that exist."""

import re

import pytest
from tools.layout import layers, loose, rooms

from tests.support.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
PACKAGE = ROOT / "src" / "lorasmith"


def section(title: str) -> str:
    """What stands below a heading."""
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """The cells of a section's only table, below its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(text: str) -> list[str]:
    """The files that a text names; one with capitals in its name is still to be written."""
    found = re.findall(r"`([\w./]+\.\w+)`", text)
    return [name for name in found if "/" in name and not re.search(r"/[A-Z]+\.", name)]


def test_the_picture_of_the_layers_is_the_contract():
    picture = re.findall(r"^    (.+)$", section("How the code is laid out"), re.MULTILINE)
    assert [line.replace(" ", "").replace("|", ":").split(":") for line in picture] == layers()
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert contract is not None
    assert picture == re.findall(r'^    "(.*)",$', contract[1], re.MULTILINE)


def test_every_room_and_module_beside_the_rooms_has_one_line():
    found = [cells[0].strip("`") for cells in table("How the code is laid out")]
    assert sorted(found) == sorted([*rooms(), *loose()])
    assert {*found, "__main__"} == {room for layer in layers() for room in layer}


@pytest.mark.parametrize("cells", table("Words"), ids=lambda cells: cells[0])
def test_a_word_stands_where_the_table_says(cells):
    words, _meaning, where = cells
    assert named(where), where
    for name in named(where):
        source = (PACKAGE / name).read_text("utf-8")
        for word in re.findall(r"`(\w+)`", words):
            assert re.search(rf"^class {word}\b", source, re.MULTILINE), f"{word} is not in {name}"


@pytest.mark.parametrize("cells", table("Adding something"), ids=lambda cells: cells[0])
def test_what_is_to_be_touched_exists(cells):
    _what, package, elsewhere, _count, test = cells
    assert named(package)
    for name in named(package):
        assert (PACKAGE / name).is_file(), name
    for name in named(elsewhere + test):
        assert (ROOT / name).is_file(), name
    code = "".join((PACKAGE / name).read_text("utf-8") for name in named(package))
    for word in re.findall(r"`(\w+)`", package):
        assert re.search(rf"\b{word}\b", code), f"{word} is in none of {', '.join(named(package))}"


def test_a_variant_of_lora_is_three_files():
    (package,) = (cells[1] for cells in table("Adding something") if cells[0] == "a LoRA variant")
    assert len(re.findall(r"`[\w/]+\.py`", package)) == 3


def test_every_other_file_that_it_names_exists():
    for name in set(named(re.sub(r"^\|.*\n", "", TEXT, flags=re.MULTILINE))):
        assert any((root / name).is_file() for root in (ROOT, PACKAGE)), name
