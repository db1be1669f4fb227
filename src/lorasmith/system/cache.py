"""The user's cache folder. Entries appear under their final name only when complete, and each has one writer at a time.

$XDG_CACHE_HOME/lorasmith (or ~/.cache/lorasmith)
├── data/        the rows of `lorasmith demo`
├── downloads/   wheels that the user put there; searched before any package registry
├── measured/    time and memory of earlier runs; rows/ holds encoded rows
├── packages/    NAME-VERSION: files extracted from a Python package
└── models/      converted models, each a plain Hugging Face folder
"""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasmith.errors import ModelError
from lorasmith.i18n import _, foreign
from lorasmith.report import Report
from lorasmith.system.locking import flock
from lorasmith.system.writing import NEW, new_file, new_folder

PRIVATE = 0o700


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lorasmith, or ~/.cache/lorasmith if the variable is unset or, as XDG demands, not absolute."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "lorasmith"


@contextmanager
def exclusive_access(target: Path, report: Report) -> Iterator[None]:
    """Make sure that only one process at a time creates `target`; a second one reports that it waits.

    The lock ends with the process that holds it, so a killed process leaves nothing to clean up. Without support for
    locks, both processes work, and the first result stays (see `new_cache_folder`). Raises ModelError if the cache is
    not writable.
    """
    _prepare(target.parent)
    with (target.parent / f".{target.name}.lock").open("a") as file:
        if _lock(file.fileno(), target, report):
            for leftover in target.parent.glob(f".{glob.escape(target.name)}{NEW}*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def new_cache_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `target` if the block succeeds and is removed if it raises."""
    _prepare(target.parent)
    with new_folder(target, replace=False) as folder:  # without locks, another process' result is as good as ours
        yield folder


def write_cached(place: Path, most: int, write: Callable[[Path], object]) -> None:
    """Write the file `place` atomically, and delete the oldest files of the same suffix beyond `most`.

    Only the user can read the file and its folder. These files only save time, so errors of the file system are
    ignored.
    """
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.parent.chmod(PRIVATE)
        with new_file(place, private=True) as staging:
            write(staging)
        for path in sorted(place.parent.glob(f"*{place.suffix}"), key=lambda path: path.stat().st_mtime)[:-most]:
            path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise ModelError if fewer than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            _(
                "{folder}: {needed} MB are needed, but only {free} MB are free. Free some space, or set "
                "XDG_CACHE_HOME to a folder on a larger disk.",
                folder=folder,
                needed=round(needed / 1e6),
                free=round(free / 1e6),
            )
        )


def _prepare(folder: Path) -> None:
    """Create `folder`. Raises ModelError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        reason = _("not writable")
    except OSError as error:
        writable, reason = False, foreign(error.strerror)
    if not writable:
        raise ModelError(
            _(
                "{folder}: {reason}. Set XDG_CACHE_HOME to a folder that you can write to.",
                folder=folder,
                reason=reason,
            )
        )


def _lock(handle: int, target: Path, report: Report) -> bool:
    """Wait for the lock on an open file. Returns False if locks are not supported."""
    got = flock(handle)
    if got is False:
        report.say(_("Another process is creating {target}; waiting for it to finish.", target=target))
        got = flock(handle, wait=True)
    return got is True
