"""Files and folders that get their names only once they are complete and on disk: the one way to write either.

A process that is killed while it writes leaves a hidden entry beside the name, and nothing else:

    .NAME.lorasmith-new-XXXXXXXX   not complete, or not yet under its name
    .NAME.lorasmith-old            the folder that was NAME until a new one took its place

At every moment NAME or .NAME.lorasmith-old is complete; `recover` gives the old one its name back where the new one has
not got it. A link is never followed, and nothing is removed that has another name.
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
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what a file system says that cannot write a folder through


@contextmanager
def writing(path: Path, is_run: bool = True) -> Iterator[None]:
    """Within it, a disk that refuses (full, over quota, read-only) is a RunError that names `path`.

    `is_run`: it is part of a run, which the RunError then says how to go on with.
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
    """Write a text file; `is_run` as for `writing`, which every OSError passes."""
    with writing(path, is_run), new_file(path) as staging:
        staging.write_text(text, "utf-8")


def write_folder(folder: Path, fill: Callable[[Path], None], is_run: bool = True) -> None:
    """Have `fill` write a folder, in the place of the one that is there; `is_run` as for `write_file`."""
    with writing(folder, is_run), new_folder(folder) as staging:
        fill(staging)


@contextmanager
def new_file(path: Path, private: bool = False) -> Iterator[Path]:
    """An empty file beside `path` to write into; it becomes `path` when the block ends well. Raises OSError.

    `private`: only the user can read it, whatever the umask says.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}{NEW}", dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        if private:
            staging.chmod(0o600)
        else:
            follow_umask(staging)
        sync(staging)
        staging.replace(path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; it becomes `folder` when the block ends well. Raises OSError.

    Without `replace`, a folder that another process put there meanwhile stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}{NEW}", dir=folder.parent))
    try:
        yield staging
        follow_umask(staging)
        for path in (*staging.rglob("*"), staging):
            sync(path)
        if replace or not (folder.is_dir() and any(folder.iterdir())):
            _put(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, folder: Path) -> None:
    """Name a complete folder; the one that was there goes once the new name is on disk."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    old = folder.with_name(f".{folder.name}{OLD}")
    try:
        if folder.is_dir() and any(folder.iterdir()):  # a rename goes over an empty one
            remove(old)  # left by a process that was killed when the new one had its name already
            folder.rename(old)
        staging.rename(folder)
    finally:
        if not folder.exists() and old.is_dir():
            old.rename(folder)
    sync(folder.parent)
    remove(old)


def recover(place: Path, is_ours: Callable[[str], bool], leftover: re.Pattern[str] = LEFTOVER) -> None:
    """Undo what killed processes left half-done in the folder `place`, of the names for which `is_ours` holds.

    Nobody else may be writing there. Raises OSError.
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
    """Remove a file, or a folder with all in it; neither a link nor what it leads to. Raises OSError."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder that never has its name while a part of it is gone already. Raises OSError."""
    going = Path(tempfile.mkdtemp(prefix=f".{folder.name}{NEW}", dir=folder.parent))
    folder.rename(going)  # over an empty folder
    remove(going)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk: they outlast a loss of power. Raises OSError."""
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


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all in it, the modes of any other: tempfile and safetensors make private ones."""
    umask = os.umask(0)  # there is no way to read it without setting it
    os.umask(umask)
    for one in (path, *path.rglob("*")):
        if not one.is_symlink():
            one.chmod((0o777 if one.is_dir() else 0o666) & ~umask)
