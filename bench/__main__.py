"""lorasmith beside PEFT with transformers' Trainer: `make bench`, `make bench-quick`, or `python -m bench`.

Both are whole programs, run in turn; nothing else may run on the machine meanwhile. A rate is the difference of two
whole runs on few and on many rows, so that no figure is taken from what either prints. Tokens are counted as they
stand in the data after the cut, whatever either program computes of them. The peer runs at the best of its settings,
found in one round; then come rounds of both, and medians. Writes JSON as it goes, and the table at the end.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from bench import commands
from bench.evaluation import evaluation
from bench.lengths import lengths
from bench.limit import limit
from bench.machine import machine, versions
from bench.programs import Failed, Missing
from bench.rows import CHAT
from bench.state import STEP, Bench, Book, Clock, say
from bench.table import render
from bench.training import bloom, rows_of, sizes, training
from lorasmith.loading.gguf import packaged_model
from lorasmith.report import Report

BUDGET, QUICK_BUDGET = 44 * 60, 4.75 * 60  # seconds
ROUNDS = 3
USUAL_RATE = 300  # tokens/s of the peer's usual best where the jobs take the seconds below
SLOW = 1.5  # times slower, from which on there are half as many rows


class Job(NamedTuple):
    """A piece of the bench: its section, about how many seconds it takes, and with --quick (None: not then)."""

    section: str
    name: str
    seconds: float
    quick: float | None
    work: Callable[[Bench], None]


JOBS = (  # what matters most comes first; what no time is left for is left out, and said
    Job("training", "chat", 560, 95, lambda bench: training(bench, "chat")),
    Job("parts", "chat", 45, 25, lambda bench: limit(bench, "chat")),
    Job("evaluation", "chat", 265, 55, evaluation),
    Job("lengths", "", 280, 70, lengths),
    Job("training", "alpaca", 640, 115, lambda bench: training(bench, "alpaca")),
    Job("parts", "alpaca", 75, 45, lambda bench: limit(bench, "alpaca")),
    Job("bloom", "", 330, None, bloom),
    Job("sizes", "", 180, None, sizes),
)
SECTIONS = tuple(dict.fromkeys(job.section for job in JOBS))


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1: a section failed, 130: Ctrl-C."""
    args = _arguments(words)
    with ExitStack() as stack:
        bench = Bench(
            quick=args.quick,
            rounds=1 if args.quick else args.rounds,
            dtype=args.dtype,
            model=packaged_model("smollm2-135m-instruct", Report()),
            scratch=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorasmith-bench-"))),
            book=Book(Path(args.json).absolute(), _head(args)),
            clock=Clock(QUICK_BUDGET if args.quick else BUDGET),
        )
        status = measure(bench, [job for job in JOBS if job.section in args.only])
    print(render(bench.book.data))
    say(f"{bench.clock.spent / 60:.1f} minutes; figures in {args.json}")
    return status


def measure(bench: Bench, jobs: Sequence[Job]) -> int:
    """Every job that the time allows. Ctrl-C and a program that fails leave what was measured."""
    status = 0
    try:
        slowness = _find_pace(bench)
        for number, job in enumerate(jobs):
            what = f"{job.section} {job.name}".rstrip()
            bench.clock.kept = slowness * sum(_seconds(bench, later) or 0 for later in jobs[number + 1 :])
            expected = _seconds(bench, job)
            if expected is None:
                bench.book.leave_out(what, "not with --quick")
            elif number and bench.clock.spent + slowness * expected > bench.clock.budget:
                bench.book.leave_out(what, "no time left")
            else:
                status |= _do(bench, job, what)
    except Failed as failure:  # already of the first short run
        bench.book.leave_out("everything", str(failure))
        status = 1
    except KeyboardInterrupt:
        bench.book.leave_out("the rest", "stopped by Ctrl-C")
        status = 130
    bench.book.data["seconds"] = bench.clock.spent
    bench.book.write()
    return status


def _do(bench: Bench, job: Job, what: str) -> int:
    started = time.monotonic()
    try:
        job.work(bench)
    except Failed as failure:
        bench.book.leave_out(what, str(failure))
        return 0 if isinstance(failure, Missing) else 1
    say(f"  {what} took {time.monotonic() - started:.0f} s")
    return 0


def _seconds(bench: Bench, job: Job) -> float | None:
    return job.quick if bench.quick else job.seconds


def _find_pace(bench: Bench) -> float:
    """Times slower than where the jobs' seconds are from; by one short run, which also fills the file cache."""
    program = commands.peer(bench.model, CHAT, commands.TRAINING[commands.USUAL_BEST])
    rows = rows_of(bench, CHAT, bench.model)
    ran = bench.run(program, rows, 2 * STEP)
    slowness = USUAL_RATE * (ran.seconds - (ran.start_seconds or 0.0)) / rows.tokens(2 * STEP)
    bench.scale = 0.5 if slowness > SLOW else 1.0
    say(f"this machine takes {slowness:.2f} times as long as expected" + " with half the rows" * (bench.scale < 1))
    return slowness * bench.scale


def _head(args: argparse.Namespace) -> dict[str, object]:
    words = ["python -m bench", *["--quick"] * args.quick]
    words += [f"--only {','.join(args.only)}"] * (args.only != SECTIONS)
    words += [f"--rounds {args.rounds}"] * (args.rounds != ROUNDS) + [f"--dtype {args.dtype}"] * (args.dtype != "auto")
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": " ".join(words), "date": now, "machine": machine(args.dtype), "versions": versions()}


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of fewer rows and settings: under five minutes")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="rounds of both programs, where the time allows them"
    )
    parser.add_argument("--only", type=_sections, default=SECTIONS, help="sections, by comma: " + ", ".join(SECTIONS))
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of lorasmith's base")
    parser.add_argument("--json", help="file that gets the figures; bench.json or bench-quick.json where not given")
    args = parser.parse_args(words)
    args.json = args.json or ("bench-quick.json" if args.quick else "bench.json")
    return args


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
