"""Where an exported model comes from: its base model with its license, as metadata of GGUF."""

import re
from pathlib import Path

from lorasmith.adapters.session import Session
from lorasmith.export.gguf.families import Value

LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def origin_of(session: Session) -> dict[str, Value]:
    """Name and license of the base model, as far as they are known. A path is given without its folders."""
    source = str(session.base.source)
    found: dict[str, Value] = {}
    if session.folders:
        name = Path(source).name if Path(source).expanduser().exists() else source
        found |= {"general.base_model.count": 1, "general.base_model.0.name": name}
    if (text := license_of(session.base.folder)) is not None:
        found["general.license"] = text
    return found


def license_of(folder: Path) -> str | None:
    """The identifier of the license in the model card of a folder; None if there is none."""
    try:
        front = FRONT.match((folder / "README.md").read_text("utf-8", errors="replace"))
    except OSError:
        return None
    found = LICENSE.search(front[1]) if front else None
    return found[1] if found else None
