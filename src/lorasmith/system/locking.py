"""A lock on a folder that ends with the process that holds it, however that ends. Loads no torch.

It is a file that is there while it is held; one that a killed process left is nobody's. The lock is flock's, which
belongs to an open file: another descriptor of the same process neither shares nor drops it.
"""

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasmith.errors import RunError
from lorasmith.i18n import _

PATIENCE = 1.0  # seconds; who only looks whether it is held has it for an instant
_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) if sys.platform != "win32" else 0


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[bool]:
    """Hold the lock file `path` for `folder`; folders on the way to it are made, and go again if they stay empty.

    Yields False where the file system has no locks. Raises RunError where another process holds it, and OSError.
    """
    made: list[Path] = []
    try:
        handle, has_locks = _taken(path, folder, made)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
            yield has_locks
        finally:
            path.unlink(missing_ok=True)  # while it is held: who opened it before finds that the name is gone
            os.close(handle)
    finally:
        for place in reversed(made):
            with suppress(OSError):  # it is no longer empty
                place.rmdir()


def is_locked(path: Path) -> bool:
    """Whether a process, this one or another, holds the lock file `path`; nobody loses or misses it by that."""
    try:
        handle = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    try:
        return flock(handle, shared=True) is False
    finally:
        os.close(handle)


def flock(handle: int, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file; False where another one has it, None where the system or the file system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _taken(path: Path, folder: Path, made: list[Path]) -> tuple[int, bool]:
    """A descriptor that holds `path`, and whether there are locks; `made` gets the folders that were missing."""
    end = time.monotonic() + PATIENCE
    while True:
        missing = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file is where a folder must be
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
        made += [place for place in reversed(missing) if place not in made]
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        except FileNotFoundError:  # the process that made the folder too took it away again
            if time.monotonic() > end:
                raise
            continue
        got = flock(handle)
        if got is not False and _is_at(handle, path):
            return handle, got is True
        who = _holder(handle)
        os.close(handle)
        if got is False and time.monotonic() > end:
            raise RunError(
                _("{folder} is in use by {who}. Wait until it has finished, or stop it.", folder=folder, who=who)
            )
        time.sleep(0.02)


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file: the process that held it takes it away when it ends."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """Who holds the lock, as it wrote down."""
    number, _space, host = os.pread(handle, 300, 0).decode("utf-8", "replace").strip().partition(" ")
    if not number.isdecimal():
        return _("another process")
    if host == socket.gethostname():
        return _("process {number}", number=number)
    return _("process {number} on {host}", number=number, host=host)
