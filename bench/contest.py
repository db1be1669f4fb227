"""Two programs in turn on the same rows: one round finds the peer's best setting, then come rounds of both."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.commands import Program
from bench.rates import OURS, PEER, Measured, best_setting, compare
from bench.rows import Rows
from bench.state import Bench, say


@dataclass(frozen=True)
class Contest:
    """Both programs, the peer's settings to try, and how many rows; `search` are the counts while trying.

    `passes`: how often our program computes each row where the peer does once.
    """

    section: str
    name: str
    ours: Program
    peer: Callable[[Sequence[str]], Program]
    settings: Mapping[str, Sequence[str]]
    rows: Rows
    counts: tuple[int, int]
    search: tuple[int, int]
    passes: int = 1


def hold(bench: Bench, contest: Contest) -> None:
    """Measure; the figures so far are in the book after every pair of runs. Raises Failed."""
    runs: list[Measured] = []

    def measure(program: str, setting: str, launch: Program, counts: tuple[int, int], passes: int) -> None:
        runs.append(_measured(bench, program, setting, launch, contest.rows, counts, passes))
        bench.book.put(contest.section, contest.name, compare(runs, best_setting(runs)))

    say(f"{contest.section}, {contest.name}: {contest.counts[0]} and {contest.counts[1]} rows")
    for setting, words in contest.settings.items():
        measure(PEER, setting, contest.peer(words), contest.search, 1)
    best = best_setting(runs)
    taken = 0.0
    for number in range(bench.rounds):
        if number and not bench.clock.has(taken):
            say("  no time for another round")
            break
        started = time.monotonic()
        measure(OURS, "default", contest.ours, contest.counts, contest.passes)
        if number or contest.search != contest.counts:  # else the search was the peer's first round
            measure(PEER, best, contest.peer(contest.settings[best]), contest.counts, 1)
        taken = time.monotonic() - started


def _measured(
    bench: Bench, program: str, setting: str, launch: Program, rows: Rows, counts: tuple[int, int], passes: int
) -> Measured:
    few, many = (bench.run(launch, rows, count) for count in counts)
    tokens = passes * (rows.tokens(counts[1]) - rows.tokens(counts[0]))
    found = Measured(program, setting, counts, tokens, few, many)
    say(
        f"  {bench.clock.spent / 60:5.1f} min  {program:<15} {setting:<38} {found.tokens_per_second:7.1f} tokens/s"
        f" {many.peak_mib:7.0f} MiB"
    )
    return found
