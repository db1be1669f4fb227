"""lorasmith's rate at rows of 32 to 4,096 tokens, as many tokens in all at each length."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from bench import commands
from bench.programs import Failed
from bench.rates import OURS, Measured
from bench.rows import CHAT, Kind, Rows, records_of
from bench.state import Bench, say

LENGTHS, QUICK = (256, 2048, 32, 128, 1024, 4096), (256, 2048)  # in the order of their weight
FEW, MORE = 4096, 16384  # tokens of the shorter run, and how many more the longer one has
QUICK_FEW, QUICK_MORE = 2048, 8192
CHARACTERS = 8  # that one token holds at most, on average: what is over is cut


def lengths(bench: Bench) -> None:
    """Each length in turn, and the rate at 2,048 tokens a row against that at 256."""
    few, more = (int(n * bench.scale) for n in ((QUICK_FEW, QUICK_MORE) if bench.quick else (FEW, MORE)))
    text = " ".join(_texts(records_of(CHAT) or []))
    found: dict[int, float] = {}
    for length in QUICK if bench.quick else LENGTHS:
        measured = _measure(bench, length, text, few, more)
        found[length] = measured.tokens_per_second
        bench.book.put("lengths", str(length), measured.as_json() | {"peak_mib": measured.many.peak_mib})
        if 256 in found and 2048 in found:
            bench.book.put("lengths", "ratio", {"2048 to 256": found[2048] / found[256]})


def _measure(bench: Bench, length: int, text: str, few: int, more: int) -> Measured:
    kind = Kind(f"{length}-tokens", "human-assistant", length)
    counts = max(1, few // length), max(1, few // length) + max(1, more // length)
    rows = Rows(kind, plain_rows(text, length, counts[1]), bench.model, bench.scratch)
    program = commands.our_training(str(bench.model), kind, bench.dtype, commands.DEMO)
    tokens = rows.tokens(counts[1]) - rows.tokens(counts[0])
    if tokens != length * (counts[1] - counts[0]):
        raise Failed(f"rows of {length} tokens: {tokens} in {counts[1] - counts[0]} rows")
    runs = [bench.run(program, rows, count) for count in counts]
    found = Measured(OURS, f"{length} tokens a row", counts, tokens, *runs)
    say(f"  {bench.clock.spent / 60:5.1f} min  {found.setting:<38} {found.tokens_per_second:7.1f} tokens/s")
    return found


def plain_rows(text: str, length: int, count: int) -> list[dict[str, Any]]:
    """Rows that are nearly all answer, longer than `length` tokens; their numbers keep them from beginning alike."""
    size = length * CHARACTERS
    endless = text * (2 + size // len(text))
    starts = islice(range(0, 10**9, max(1, len(text) // count)), count)
    return [
        {"instruction": str(number), "input": "", "output": endless[start % len(text) :][:size]}
        for number, start in enumerate(starts)
    ]


def _texts(records: Sequence[dict[str, Any]]) -> list[str]:
    return [str(message["content"]) for fields in records for message in fields["messages"]]
