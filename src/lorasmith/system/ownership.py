"""Which folders are ours: those that say so in a small file, and hold nothing but what we wrote. Loads no torch.

FOLDER/.lorasmith    {"version": 1, "folder": "run"}, or "model" with the names of the files that were written with it

By a file of another name nobody can tell whose folder it is: many programs have a config.toml or a config.json.
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
NAMED = 3  # entries of others that a sentence names

Kind = Literal["run", "model"]


class _Mark(BaseModel):
    version: Literal[1]
    folder: Kind
    files: list[str] = []


def mark(folder: Path, kind: Kind, files: list[str] | None = None) -> None:
    """Write into a folder whose it is. Raises RunError."""
    what = {"version": VERSION, "folder": kind} | ({} if files is None else {"files": files})
    write_file(folder / MARKER, json.dumps(what, indent=2) + "\n", is_run=kind == "run")


def is_marked(folder: Path, kind: Kind) -> bool:
    """Whether the folder says that it is ours, and of this kind."""
    found = _read(folder)
    return found is not None and found.folder == kind


def marked_files(folder: Path) -> frozenset[str]:
    """The files that were written with the marker, as paths from the folder."""
    found = _read(folder)
    return frozenset([MARKER, *found.files] if found else ())


def _read(folder: Path) -> _Mark | None:
    """What the marker says; None where there is none that this version of lorasmith understands."""
    path = folder / MARKER
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return read_back(path, _Mark)
    except (OSError, ValueError):
        return None


def of_others(folder: Path, is_ours: Callable[[PurePath], bool]) -> list[str]:
    """What in a folder we did not write, as paths from it, about which `is_ours` is asked. A link is never ours."""
    return sorted(str(path.relative_to(folder)) for path, ours in _walk(folder, folder, is_ours) if not ours)


def named(paths: list[str]) -> str:
    """Some of these paths, for a sentence."""
    shown = listed(paths[:NAMED])
    return shown if len(paths) <= NAMED else _("{names} and {more} more", names=shown, more=len(paths) - NAMED)


def clear(folder: Path, is_ours: Callable[[PurePath], bool], keep: frozenset[str]) -> None:
    """Remove what we wrote into a folder, but for `keep`; what others wrote stays, with the folders around it.

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
    """Everything below `place` and whether it is ours, a folder before what is in it; not into folders of others."""
    with os.scandir(place) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        ours = not entry.is_symlink() and is_ours(path.relative_to(folder))
        yield path, ours
        if ours and entry.is_dir():
            yield from _walk(path, folder, is_ours)
