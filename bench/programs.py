"""Run a whole program, alone on the machine: how long it took, its peak memory, when its first step began."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEAK_UNITS = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in a MiB


class Failed(Exception):
    """A program came to no figure; the text says why."""


class Missing(Failed):
    """What a section needs is not on this machine."""


@dataclass(frozen=True)
class Ran:
    """One whole run: wall time, peak resident memory, time from its start to the marker, if any, and CPU time.

    anonymous_mib: the peak without mapped files, which the system can drop and read again; sampled, 0 if unknown.
    """

    seconds: float
    peak_mib: float
    start_seconds: float | None
    cpu_seconds: float = 0.0
    anonymous_mib: float = 0.0


def run(words: Sequence[str], marker: Path | None = None) -> Ran:
    """Run a program to its end. `marker`: a file that it writes just before its first step.

    The kernel counts into a child's peak what the parent held when it started it, so this process must stay small:
    whatever loads a model is a program of its own. Raises Failed with the program's last words.
    """
    with tempfile.TemporaryFile("w+") as errors:
        began, started = time.time(), time.perf_counter()
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            with _anonymous(process.pid) as anonymous:
                _pid, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen did not see it end
        if process.returncode:
            errors.seek(0)
            raise Failed(f"exit code {process.returncode}\n{' '.join(words)}\n{errors.read()[-2000:]}")
    start = marker.stat().st_mtime - began if marker else None
    return Ran(seconds, usage.ru_maxrss / PEAK_UNITS, start, usage.ru_utime + usage.ru_stime, max(anonymous))


@contextmanager
def _anonymous(pid: int) -> Iterator[list[float]]:
    """The anonymous memory of a process in MiB, ten times a second, and a 0."""
    found, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.1):
            try:
                lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
            except OSError:  # it has ended, or the system has no such file
                continue
            found.extend(int(line.split()[1]) / 2**10 for line in lines if line.startswith("RssAnon:"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
