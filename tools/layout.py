"""Counts how the package is laid out: rooms, loose modules, layers, and which room imports which.

python -m tools.layout [CHECKOUT]    another checkout, such as one from before a change
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tools.pages import ROOT

SMALL = 60  # lines; a file with fewer is often a part of another one


def layers(root: Path = ROOT) -> list[list[str]]:
    """The layers of the import contract in pyproject.toml, from the top down, each with its rooms."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["type"] == "layers")
    return [layer.replace("|", ":").replace(" ", "").split(":") for layer in contract["layers"]]


def sources(root: Path = ROOT) -> list[Path]:
    """Every module of the package, as a path from it; a package's empty `__init__.py` is none."""
    package = root / "src" / "lorasmith"
    return sorted(path.relative_to(package) for path in package.rglob("*.py") if path.read_text("utf-8").strip())


def loose(root: Path = ROOT) -> list[str]:
    """The modules beside the rooms, without `__init__` and `__main__`."""
    return [path.stem for path in sources(root) if len(path.parts) == 1 and not path.stem.startswith("__")]


def rooms(root: Path = ROOT) -> list[str]:
    """The folders of the package that hold modules."""
    return sorted({path.parts[0] for path in sources(root) if len(path.parts) > 1})


def arrows(root: Path = ROOT) -> set[tuple[str, str]]:
    """Which room or loose module imports which other one, imports inside functions included."""
    package, found = root / "src" / "lorasmith", set()
    for path in sources(root):
        own = path.with_suffix("").parts[0]
        found |= {(own, other) for other in _imported(ast.parse((package / path).read_text("utf-8"))) if other != own}
    return {arrow for arrow in found if "__init__" not in arrow}


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorasmith"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("lorasmith.")]
        else:
            continue
        yield from {name.split(".")[1] for name in names if "." in name}


def main(root: Path) -> None:
    """Print the counts."""
    lines = [len((root / "src" / "lorasmith" / path).read_text("utf-8").splitlines()) for path in sources(root)]
    for name, count in (
        ("rooms", len(rooms(root))),
        ("loose modules", len(loose(root))),
        ("layers", len(layers(root))),
        ("arrows between them", len(arrows(root))),
        ("modules", len(lines)),
        ("lines", sum(lines)),
        (f"modules under {SMALL} lines", sum(line < SMALL for line in lines)),
        ("lines of the longest module", max(lines)),
    ):
        print(f"{name:<30}{count:>8,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
