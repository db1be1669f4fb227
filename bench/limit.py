"""The share of the limit and the breakdown, in a program of its own: see parts.py."""

import json
import sys

from bench.programs import run
from bench.rows import KINDS
from bench.state import STEP, Bench, say
from bench.training import rows_of

STEPS, QUICK_STEPS = {"chat": 12, "alpaca": 8}, {"chat": 6, "alpaca": 5}


def limit(bench: Bench, name: str) -> None:
    """Our own steps on rows of one kind, beside the products that they cannot avoid. Raises Failed, Missing."""
    rows_of(bench, KINDS[name], bench.model)  # raises where they are not there
    steps = (QUICK_STEPS if bench.quick else STEPS)[name]
    output = bench.scratch / f"parts-{name}.json"
    words = ["--rows", name, "--count", str(STEP * steps), "--model", str(bench.model), "--dtype", bench.dtype]
    say(f"parts, {name}: {steps} steps")
    run([sys.executable, "-m", "bench.parts", *words, "--output", str(output)])
    found = json.loads(output.read_text("utf-8"))
    bench.book.put("parts", name, found)
    say(f"  {found['tokens_per_second']:.1f} tokens/s, {found['share']:.2f} of the limit")
