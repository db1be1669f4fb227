"""Atomic writing: a file or folder gets its name only when it is complete and on disk. Everything is written this way.

A process that is killed while writing leaves at most these hidden entries beside NAME:

    .NAME.lorasmith-new-XXXXXXXX   the new version, incomplete or not yet renamed
    .NAME.lorasmith-old            the previous version of a folder that is being replaced

NAME or .NAME.lorasmith-old is complete at every moment, and `recover` renames the latter back if NAME is missing.
Links are never followed, and nothing with another name is ever removed.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorasmith.errors import RunError
from lorasmith.i18n import _, foreign

NEW, OLD = ".lorasmith-new-", ".lorasmith-old"
LEFTOVER = re.compile(rf"\.(?P<name>.+)(?:{re.escape(NEW)}\w+|(?P<old>{re.escape(OLD)}))", re.ASCII | re.DOTALL)
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # from file systems that cannot sync a folder


@contextmanager
def writing(path: Path, is_run: bool = True) -> Iterator[None]:
    """A context in which an error of the file system, such as a full disk, becomes a RunError that names `path`.

    is_run: `path` belongs to a run, so the message mentions --resume.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = foreign(error.strerror) if isinstance(error, OSError) and error.strerror else error
        text = _(
            "{path}: cannot be written: {why}. Files that were complete before are unchanged. Free some space "
            "or choose another --output",
            path=path,
            why=why,
        )
        raise RunError(
            text + (_("; use --resume to continue a run that has already started.") if is_run else ".")
        ) from error


def write_file(path: Path, text: str, is_run: bool = True) -> None:
    """Write a text file atomically, in UTF-8. Raises RunError; `is_run` as in `writing`."""
    with writing(path, is_run), new_file(path) as staging:
        staging.write_text(text, "utf-8")


def write_folder(folder: Path, fill: Callable[[Path], None], is_run: bool = True) -> None:
    """Write a folder atomically with `fill`, replacing an existing one. Raises RunError; `is_run` as in `writing`."""
    with writing(folder, is_run), new_folder(folder) as staging:
        fill(staging)


@contextmanager
def new_file(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield an empty file, which becomes `path` if the block succeeds and is removed if it raises. Raises OSError.

    private: only the user can read it, whatever the umask says.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}{NEW}", dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        if private:
            staging.chmod(0o600)
        else:
            apply_umask(staging)
        sync(staging)
        staging.replace(path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder, which becomes `folder` if the block succeeds and is removed if it raises. Raises OSError.

    replace: replace an existing folder; if false, a non-empty one stays and the new one is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}{NEW}", dir=folder.parent))
    try:
        yield staging
        apply_umask(staging)
        for path in (*staging.rglob("*"), staging):
            sync(path)
        if replace or not (folder.is_dir() and any(folder.iterdir())):
            _put(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, folder: Path) -> None:
    """Rename a complete folder to its final name; the previous one is removed once the new name is on disk."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    old = folder.with_name(f".{folder.name}{OLD}")
    try:
        if folder.is_dir() and any(folder.iterdir()):  # a rename can replace an empty folder
            remove(old)  # of a process that was killed after it had renamed its new folder
            folder.rename(old)
        staging.rename(folder)
    finally:
        if not folder.exists() and old.is_dir():
            old.rename(folder)
    sync(folder.parent)
    remove(old)


def recover(place: Path, is_ours: Callable[[str], bool], leftover: re.Pattern[str] = LEFTOVER) -> None:
    """Clean up after killed processes in the folder `place`: rename old versions back, remove incomplete new ones.

    Touches only entries whose NAME satisfies `is_ours`. No other process may be writing there. Raises OSError.
    """
    found = [(left, match) for left in place.iterdir() if (match := leftover.fullmatch(left.name))]
    for left, match in sorted(found, key=lambda one: one[0].lstat().st_mtime, reverse=True):
        if left.is_symlink() or not is_ours(match["name"]):
            continue
        if match["old"] and not os.path.lexists(place / match["name"]):
            left.rename(place / match["name"])
            sync(place)
        else:
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, but never a link or its target. Raises OSError."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder, renaming it first so that it is never incomplete under its own name. Raises OSError."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}{NEW}", dir=folder.parent))
    folder.rename(hidden)  # replaces the empty folder
    remove(hidden)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk, so that they survive a power failure. Raises OSError."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(handle)


def apply_umask(path: Path) -> None:
    """Give a file, or a folder and its content, the usual modes: tempfile and safetensors create private files."""
    umask = os.umask(0)  # it cannot be read without setting it
    os.umask(umask)
    for one in (path, *path.rglob("*")):
        if not one.is_symlink():
            one.chmod((0o777 if one.is_dir() else 0o666) & ~umask)
