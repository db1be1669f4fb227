"""Where an exported model comes from: its base model with its license, as metadata of GGUF."""

from lorasmith.adapters.public_names import without_folders
from lorasmith.adapters.session import Session
from lorasmith.export.gguf.families import Value
from lorasmith.loading.license import license_of


def origin_of(session: Session) -> dict[str, Value]:
    """Name and license of the base model, as far as they are known. A path is given without its folders."""
    found: dict[str, Value] = {}
    if session.folders:
        found |= {"general.base_model.count": 1, "general.base_model.0.name": without_folders(session.base.source)}
    if (text := license_of(session.base.folder)) is not None:
        found["general.license"] = text
    return found
