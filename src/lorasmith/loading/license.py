"""The license of a model, from its card."""

import re
from pathlib import Path

LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def license_of(folder: Path) -> str | None:
    """The identifier of the license in the model card of a folder; None if there is none."""
    try:
        front = FRONT.match((folder / "README.md").read_text("utf-8", errors="replace"))
    except OSError:
        return None
    found = LICENSE.search(front[1]) if front else None
    return found[1] if found else None
