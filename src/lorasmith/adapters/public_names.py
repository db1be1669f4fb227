"""Names that others may see: of a path, only its last part."""

from pathlib import Path
from typing import Any


def without_folders(name: str) -> str:
    """A name on a hub as it is, and the last part of a path."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def without_paths(value: Any) -> Any:
    """JSON in which absolute paths are replaced by their last parts."""
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if isinstance(value, dict):
        return {key: without_paths(one) for key, one in value.items()}
    return without_folders(value) if isinstance(value, str) and Path(value).is_absolute() else value
