"""Which folders and files lorasmith wrote, so that overwriting never removes anything else. Loads no torch.

FOLDER/.lorasmith    {"version": 1, "folder": "run" or "study"}, or "model" or "adapter" with the names of its files

Only this marker identifies a folder: many programs write a config.toml or a config.json.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Literal

from pydantic import BaseModel

from lorasmith.config.values import read_back
from lorasmith.i18n import _, listed
from lorasmith.system.writing import remove, write_file

MARKER, VERSION = ".lorasmith", 1
NAMED = 3  # paths that a message lists at most

Kind = Literal["run", "model", "adapter", "study"]


class _Mark(BaseModel):
    version: Literal[1]
    folder: Kind
    files: list[str] = []


def mark(folder: Path, kind: Kind, files: list[str] | None = None) -> None:
    """Write the marker into a folder. Raises RunError if it cannot be written."""
    what = {"version": VERSION, "folder": kind} | ({} if files is None else {"files": files})
    write_file(folder / MARKER, json.dumps(what, indent=2) + "\n", is_run=kind == "run")


def is_marked(folder: Path, kind: Kind) -> bool:
    """Whether the folder has a marker of this kind."""
    found = _read(folder)
    return found is not None and found.folder == kind


def marked_files(folder: Path) -> frozenset[str]:
    """The files that the marker lists and the marker itself, as paths relative to the folder."""
    found = _read(folder)
    return frozenset([MARKER, *found.files] if found else ())


def _read(folder: Path) -> _Mark | None:
    """The content of the marker; None if there is none that this version of lorasmith can read."""
    path = folder / MARKER
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return read_back(path, _Mark)
    except (OSError, ValueError):
        return None


def foreign_entries(folder: Path, is_ours: Callable[[PurePath], bool]) -> list[str]:
    """Everything in `folder` that lorasmith did not write, as relative paths. Links always count as foreign.

    `is_ours` decides for each relative path.
    """
    return sorted(str(path.relative_to(folder)) for path, ours in _walk(folder, folder, is_ours) if not ours)


def short_list(paths: list[str]) -> str:
    """The first of these paths and the number of further ones, for a message."""
    shown = listed(paths[:NAMED])
    return shown if len(paths) <= NAMED else _("{names} and {more} more", names=shown, more=len(paths) - NAMED)


def remove_own(folder: Path, is_ours: Callable[[PurePath], bool], keep: frozenset[str]) -> None:
    """Remove everything in `folder` for which `is_ours` holds, except `keep` and folders with foreign entries.

    Raises OSError.
    """
    found = [path for path, ours in _walk(folder, folder, is_ours) if ours]
    for path in reversed(found):
        if str(path.relative_to(folder)) in keep:
            continue
        if not path.is_dir():
            remove(path)
        elif not any(path.iterdir()):
            path.rmdir()


def _walk(place: Path, folder: Path, is_ours: Callable[[PurePath], bool]) -> Iterator[tuple[Path, bool]]:
    """Every entry below `place` and whether it is ours, folders first; foreign folders are not entered."""
    with os.scandir(place) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        ours = not entry.is_symlink() and is_ours(path.relative_to(folder))
        yield path, ours
        if ours and entry.is_dir():
            yield from _walk(path, folder, is_ours)
