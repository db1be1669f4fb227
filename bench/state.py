"""What all sections share: options, the time that is left, and the file of figures that grows as they come."""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.commands import Program
from bench.programs import Ran, run
from bench.rows import Rows

STEP = 8  # rows of one step, of which all counts are multiples


class Book:
    """The figures, by section and name; on disk after every change, so that Ctrl-C loses none."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.data = path, {**head, "sections": {}, "left_out": {}}

    def put(self, section: str, name: str, figures: dict[str, Any]) -> None:
        """Set the figures of one part of a section."""
        self.data["sections"].setdefault(section, {})[name] = figures
        self.write()

    def get(self, section: str, name: str) -> dict[str, Any]:
        """The figures of one part of a section; empty where it was not measured."""
        found: dict[str, Any] = self.data["sections"].get(section, {}).get(name, {})
        return found

    def leave_out(self, what: str, why: str) -> None:
        """Say what was not measured, and why."""
        say(f"{what}: left out: {why}")
        self.data["left_out"][what] = why
        self.write()

    def write(self) -> None:
        """The file as it is now, whole at every moment."""
        staging = self.path.with_name(self.path.name + ".part")
        staging.write_text(json.dumps(self.data, indent=2) + "\n", "utf-8")
        staging.replace(self.path)


@dataclass
class Clock:
    """`budget` seconds in all, of which `kept` belong to sections still to come."""

    budget: float
    kept: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def has(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        return self.spent + self.kept + seconds <= self.budget


@dataclass
class Bench:
    """`model`: the demo's model; `scale`: below 1 on a slow machine, which gets fewer rows."""

    quick: bool
    rounds: int
    dtype: str
    model: Path
    scratch: Path
    book: Book
    clock: Clock
    scale: float = 1.0

    @property
    def kind(self) -> str:
        """What decides the peer's settings and the goals: bfloat16 or float32."""
        return str(self.book.data["machine"]["kind"])

    def rows(self, few: int, many: int) -> tuple[int, int]:
        """Counts of rows for this machine: whole steps, and more on the second run than on the first."""
        low, high = (max(STEP, int(n * self.scale) // STEP * STEP) for n in (few, many))
        return low, max(high, low + STEP)

    def run(self, program: Program, rows: Rows, count: int) -> Ran:
        """One whole run of a program on the first `count` rows, in an empty folder. Raises Failed."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            launch = program(rows.file(count), Path(folder))
            return run(launch.words, launch.marker)


def say(text: str) -> None:
    """A line of progress: on stderr, so that stdout is the table alone."""
    print(text, file=sys.stderr, flush=True)
