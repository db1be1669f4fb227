"""What the pages of docs that are made from the code share: where they stand, how they are written, tables, code."""

import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def places(name: str) -> dict[str, Path]:
    """Where a page stands, by language."""
    return {"en": ROOT / "docs" / f"{name}.md", "zh": ROOT / "docs" / f"{name}.zh.md"}


def notes(name: str) -> dict[str, Any]:
    """What people wrote for a page, in the .toml beside its tool."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text("utf-8"))


def write(pages: dict[str, Path], page: Callable[[str], str]) -> int:
    """Writes the page in each language; 0, as a program's exit code."""
    for language, path in pages.items():
        path.write_text(page(language), "utf-8")
    return 0


def code(text: str) -> str:
    """`text` in backticks, more of them where it holds some itself."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def block(language: str, text: str) -> list[str]:
    """A fenced block, and the blank line after it."""
    return [f"```{language}", *text.rstrip("\n").split("\n"), "```", ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, and the blank line after it. A cell may hold `|`."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]
