"""From runs to figures: rates as differences of two whole runs, medians, ratios."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.programs import Failed, Ran

OURS, PEER = "lorasmith", "PEFT + Trainer"
RECIPE = "float32, 1 x 8"  # the usual recipe: a row at a time, eight to a step


@dataclass(frozen=True)
class Measured:
    """One program at one setting on few and on many rows; `tokens` are those between the two, as the data stand."""

    program: str
    setting: str
    rows: tuple[int, int]
    tokens: int
    few: Ran
    many: Ran

    @property
    def tokens_per_second(self) -> float:
        """Start-up is in both runs, so it is not in their difference. Raises Failed where that is nothing."""
        seconds = self.many.seconds - self.few.seconds
        if seconds <= 0:
            raise Failed(f"{self.program}, {self.setting}: {self.rows[1]} rows took no longer than {self.rows[0]}")
        return self.tokens / seconds

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def figures(runs: Sequence[Measured]) -> dict[str, Any]:
    """Medians over rounds of one program at one setting: rate, peak of the larger run, time to the first step."""
    starts = [ran.start_seconds for run in runs for ran in (run.few, run.many) if ran.start_seconds is not None]
    return {
        "setting": runs[0].setting,
        "rounds": len(runs),
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "peak_mib": statistics.median(run.many.peak_mib for run in runs),
        "start_seconds": statistics.median(starts) if starts else None,
    }


def best_setting(runs: Iterable[Measured]) -> str:
    """The peer's fastest setting among its runs."""
    return max((run for run in runs if run.program == PEER), key=lambda run: run.tokens_per_second).setting


def compare(runs: Sequence[Measured], best: str | None) -> dict[str, Any]:
    """What can be said so far: ours, the peer at `best` and at the recipe, and their ratios.

    The search for the peer's best setting may have had fewer rows; it counts where no round on as many rows as ours
    is there.
    """
    ours = [run for run in runs if run.program == OURS]
    peer = [run for run in runs if run.program == PEER and run.setting == best]
    recipe = [run for run in runs if run.program == PEER and run.setting == RECIPE]
    like_ours = [run for run in peer if ours and run.rows == ours[0].rows]
    sides = {"ours": ours, "peer": like_ours or peer, "recipe": recipe}
    found: dict[str, Any] = {side: figures(some) for side, some in sides.items() if some}
    for name, against, key in (
        ("ratio", "peer", "tokens_per_second"),
        ("ratio_to_recipe", "recipe", "tokens_per_second"),
        ("memory_to_recipe", "recipe", "peak_mib"),
        ("start_to_peer", "peer", "start_seconds"),
    ):
        if "ours" in found and against in found and found["ours"][key] and found[against][key]:
            found[name] = found["ours"][key] / found[against][key]
    return found | {"runs": [run.as_json() for run in runs]}
