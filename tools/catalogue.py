"""The Chinese catalogue: finds every text of the package, keeps the .po in step, says what is missing, writes the .mo.

    python -m tools.catalogue          update lorasmith.po, list what has no translation, compile lorasmith.mo
    python -m tools.catalogue --list   only list what has no translation

Exit code 1 while something is missing. Translate in the .po, then run it again; both files are committed, so that
installing needs no build step.
"""

import ast
import string
import sys
from collections.abc import Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from tools.foreign import FOREIGN, PLURALS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorasmith"
PO = SOURCE / "locale" / "zh" / "LC_MESSAGES" / "lorasmith.po"
MO = PO.with_suffix(".mo")


def found() -> Catalog:
    """Every text of the package with the files it stands in, and what Python says in our screens."""
    template = Catalog(locale="zh", project="lorasmith", version="", charset="utf-8", fuzzy=False)
    for path in sorted(SOURCE.rglob("*.py")):
        for text in texts(ast.parse(path.read_text("utf-8"))):
            template.add(text, locations=[(path.relative_to(ROOT).as_posix(), 1)])
    for text in (*FOREIGN, *PLURALS):
        template.add(text, locations=[("tools/foreign.py", 1)])
    for message in template:
        if message.id:
            message.flags.discard("python-format")  # {name}, not %s, and those of argparse are compared by our test
            message.locations = sorted(set(message.locations))
    return template


def texts(tree: ast.AST) -> Iterator[str]:
    """What stands in `_("...")`, in another such call or in an f-string, too: babel's own reader passes over those."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        match call:
            case ast.Call(func=ast.Name(id="_"), args=[ast.Constant(value=str(text)), *_]):
                yield text


def read() -> Catalog:
    """The .po as it stands."""
    with PO.open("rb") as file:
        return read_po(file, locale="zh")


def translations(catalogue: Catalog) -> dict[str, str]:
    """Every text with its translation."""
    return {_key(message.id): _key(message.string) for message in catalogue if message.id}


def missing(catalogue: Catalog) -> list[str]:
    """The texts of the package that `catalogue` does not translate."""
    known = {_key(message.id): message for message in catalogue}
    keys = [_key(message.id) for message in found() if message.id]
    return [key for key in keys if key not in known or not any(known[key].string or ()) or known[key].fuzzy]


def placeholders(text: str) -> list[tuple[str, str, str]]:
    """(name, format, conversion) of every {placeholder}, sorted."""
    parts = string.Formatter().parse(text)
    return sorted((name, spec or "", kind or "") for _text, name, spec, kind in parts if name is not None)


def update() -> Catalog:
    """The .po with every text of the package and no other; a changed text is a new one, never a guess."""
    catalogue = read()
    catalogue.update(found(), no_fuzzy_matching=True, update_creation_date=False)
    catalogue.obsolete.clear()
    with PO.open("wb") as file:
        write_po(file, catalogue, width=100, sort_by_file=True, include_lineno=False)
    return catalogue


def main() -> int:
    """Prints what is missing as it must be translated; 1 while something is."""
    catalogue = read() if "--list" in sys.argv[1:] else update()
    lacking = missing(catalogue)
    for text in lacking:
        print(repr(text))
    print(f"{len(lacking)} texts have no translation in {PO.relative_to(ROOT)}")
    if "--list" not in sys.argv[1:]:
        with MO.open("wb") as file:
            write_mo(file, catalogue)
    return int(bool(lacking))


def _key(message_id: str | tuple[str, ...] | list[str]) -> str:
    return message_id if isinstance(message_id, str) else message_id[0]


if __name__ == "__main__":
    sys.exit(main())
