"""Lock files: a lock on a folder that is released when the process that holds it ends, however it ends.

The lock is flock(2)'s on a file that exists while the lock is held; a file that a killed process left behind is not
locked. flock belongs to an open file, so opening the file a second time in one process neither shares nor releases
the lock. Loads no torch.
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

TIMEOUT = 1.0  # seconds to keep trying: `is_locked` holds a lock for an instant
_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) if sys.platform != "win32" else 0


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[bool]:
    """Hold the lock file `path`, which protects `folder`. Missing parent folders are removed again if they stay empty.

    Yields False if the file system does not support locks. Raises RunError, which names `folder` and the holder, if
    another process holds the lock, and OSError if the file cannot be created.
    """
    made: list[Path] = []
    try:
        handle, has_locks = _taken(path, folder, made)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
            yield has_locks
        finally:
            path.unlink(missing_ok=True)  # while still locked: a process that opened it earlier sees that it is gone
            os.close(handle)
    finally:
        for place in reversed(made):
            with suppress(OSError):  # not empty
                place.rmdir()


def is_locked(path: Path) -> bool:
    """Whether this or another process holds the lock file `path`. Does not disturb whoever holds or wants it."""
    try:
        handle = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    try:
        return flock(handle, shared=True) is False
    finally:
        os.close(handle)


def flock(handle: int, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file. Returns False if another holds the lock, and None if locks are not supported here."""
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
    """Open and lock `path`; returns the descriptor and whether locks are supported. Folders created go into `made`."""
    end = time.monotonic() + TIMEOUT
    while True:
        missing = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file is where a folder must be
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
        made += [place for place in reversed(missing) if place not in made]
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        except FileNotFoundError:  # another process that had created the folder has just removed it
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
    """Whether `path` still names the open file, which the previous holder removes when it ends."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """A description of the process that holds the lock, as it wrote it into the file."""
    number, _space, host = os.pread(handle, 300, 0).decode("utf-8", "replace").strip().partition(" ")
    if not number.isdecimal():
        return _("another process")
    if host == socket.gethostname():
        return _("process {number}", number=number)
    return _("process {number} on {host}", number=number, host=host)
