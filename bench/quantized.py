"""Training on a quantized base beside one in bfloat16: python -m bench.quantized [--json FILE]

The base has the shape of Llama 3.2 1B and random weights. Whole runs of `lorasmith train` in turn, each on few and on
many of the demo's rows, so that neither start nor loading is in a rate. Peaks are of whole processes; that of loading
is of one that only loads. The peak of bfloat16 contains the mapped file, of which a part was copied: layers that are
computed together. The system can drop such pages, so the peak without mapped files is measured as well.
"""

import argparse
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import commands
from bench.machine import machine, versions
from bench.programs import run
from bench.rates import OURS, Measured
from bench.rows import CHAT
from bench.state import Bench, Book, Clock, say
from bench.training import make_model, rows_of
from lorasmith.loading.gguf import packaged_model
from lorasmith.report import Report

SETTINGS = ("none", "nf4", "int8")
COUNTS = (8, 24)
NEEDED = {"memory": 0.5, "rate": 0.7}  # relative to bfloat16
_LOADING = """
import sys
from lorasmith.config.model import ModelConfig
from lorasmith.loading.load import load_base
load_base(ModelConfig(model=sys.argv[1], dtype=sys.argv[2], quantize=sys.argv[3]))
"""


def main() -> int:
    """Measure, write after every round, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantized", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="some of " + ", ".join(SETTINGS))
    parser.add_argument("--model", type=Path, help="a folder to use instead of random weights")
    parser.add_argument("--rows", type=int, nargs=2, default=COUNTS, help="of the two runs")
    parser.add_argument("--json", type=Path, default=Path("bench-quantized.json"))
    args = parser.parse_args()
    demo = packaged_model("smollm2-135m-instruct", Report())
    head = {
        "command": " ".join(["python -m bench.quantized", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(args.dtype),
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as scratch:
        book = Book(args.json.absolute(), head)
        bench = Bench(False, args.rounds, args.dtype, demo, Path(scratch), book, Clock(float("inf")))
        model = args.model or make_model(bench, "billion")
        measure(bench, model, args.settings.split(","), tuple(args.rows))
    return 0


def measure(bench: Bench, model: Path, settings: list[str], counts: tuple[int, int]) -> None:
    """Rounds of all settings in turn; the figures so far are in the book after each run."""
    rows, found = rows_of(bench, CHAT, model), dict[str, list[Measured]]()
    loading = {setting: _loading(model, bench.dtype, setting) for setting in settings}
    for _round in range(bench.rounds):
        for setting in settings:
            flags = [*commands.DEMO, "--quantize", setting]
            program = commands.our_training(str(model), CHAT, bench.dtype, flags)
            few, many = (bench.run(program, rows, count) for count in counts)
            tokens = rows.tokens(counts[1]) - rows.tokens(counts[0])
            ran = Measured(OURS, setting, counts, tokens, few, many)
            found.setdefault(setting, []).append(ran)
            rates = f"{ran.tokens_per_second:7.1f} tokens/s, {_per_cpu_second(ran):7.1f} by CPU time"
            say(f"  {setting:<6} {rates} {many.peak_mib:7.0f} MiB")
            bench.book.put("quantized", "billion", figures(found, loading))
    say(str(figures(found, loading)))


def figures(found: dict[str, list[Measured]], loading: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Medians of each setting, and their ratios to those of the unquantized base where it was measured."""
    medians = {
        setting: {
            "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
            "tokens_per_cpu_second": statistics.median(_per_cpu_second(run) for run in runs),
            "peak_mib": statistics.median(run.many.peak_mib for run in runs),
            "anonymous_mib": statistics.median(run.many.anonymous_mib for run in runs),
            "loading_seconds": loading[setting][0],
            "loading_peak_mib": loading[setting][1],
            "runs": [run.as_json() for run in runs],
        }
        for setting, runs in found.items()
    }
    whole = medians.get("none")
    for setting, one in medians.items() if whole else ():
        if setting != "none":
            one["memory"] = one["peak_mib"] / whole["peak_mib"]
            one["rate"] = one["tokens_per_second"] / whole["tokens_per_second"]
            one["rate_by_cpu"] = one["tokens_per_cpu_second"] / whole["tokens_per_cpu_second"]
    return {"needed": NEEDED, **medians}


def _per_cpu_second(run: Measured) -> float:
    """The rate where other programs run too: with one thread, they hardly change it."""
    return run.tokens / (run.many.cpu_seconds - run.few.cpu_seconds)


def _loading(model: Path, dtype: str, setting: str) -> tuple[float, float]:
    """Seconds and peak MiB of a process that loads the model and ends."""
    started = time.perf_counter()
    ran = run([sys.executable, "-c", _LOADING, str(model), dtype, setting])
    say(f"  {setting:<6} loaded in {time.perf_counter() - started:.0f} s, {ran.peak_mib:.0f} MiB")
    return ran.seconds, ran.peak_mib


if __name__ == "__main__":
    sys.exit(main())
