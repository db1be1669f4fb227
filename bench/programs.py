"""Run a whole program, alone on the machine: how long it took, its peak memory, when its first step began."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
    """One whole run: wall time, peak resident memory, time from its start to the marker, if any, and CPU time."""

    seconds: float
    peak_mib: float
    start_seconds: float | None
    cpu_seconds: float = 0.0


def run(words: Sequence[str], marker: Path | None = None) -> Ran:
    """Run a program to its end. `marker`: a file that it writes just before its first step.

    The kernel counts into a child's peak what the parent held when it started it, so this process must stay small:
    whatever loads a model is a program of its own. Raises Failed with the program's last words.
    """
    with tempfile.TemporaryFile("w+") as errors:
        began, started = time.time(), time.perf_counter()
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        try:
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
    return Ran(seconds, usage.ru_maxrss / PEAK_UNITS, start, usage.ru_utime + usage.ru_stime)
