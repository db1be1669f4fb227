"""Try every causal family of transformers on a tiny model, and compare with verdicts.json; see trial.py.

python -m tests.model.parity [FAMILY ...]       all families by default, about 10 minutes on two cores

Each family runs in a process of its own, for at most three minutes.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lorasmith.errors import first_line
from tests.model.parity.configs import FAMILIES
from tests.model.parity.page import write
from tests.model.parity.trial import DTYPES, Outcome, trial
from tests.model.parity.verdicts import FILE, changes, known, verdicts_of

SECONDS = 180
RESULTS = Path("build/parity.json")


def _child(family: str, pipe: Connection) -> None:
    """Send the outcomes of a family as dicts. Runs in its own process, which libraries may write whatever to."""
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        with tempfile.TemporaryDirectory(prefix="lorasmith-parity-") as folder:
            found = trial(family, Path(folder))
    except Exception as error:  # noqa: BLE001 (any exception is a finding)
        found = dict.fromkeys(DTYPES, Outcome("not built", f"{type(error).__name__}: {first_line(error)}"))
    pipe.send({dtype: asdict(outcome) for dtype, outcome in found.items()})


def results(families: Sequence[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The outcomes of each family, as they come."""
    context = multiprocessing.get_context("fork")  # which imports the libraries once for all
    waiting, running = list(families), dict[str, tuple[Any, Connection, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(waiting[0], theirs))
            process.start()
            theirs.close()
            running[waiting.pop(0)] = process, ours, time.monotonic()
        time.sleep(0.05)
        for family, (process, pipe, start) in list(running.items()):
            ended = ""
            if pipe.poll():
                try:
                    yield family, pipe.recv()
                except EOFError:
                    ended = "the process ended by itself"
            elif time.monotonic() - start > SECONDS:
                process.kill()
                ended = f"takes longer than {SECONDS} seconds"
            else:
                continue
            if ended:
                yield family, {dtype: asdict(Outcome("not built", ended)) for dtype in DTYPES}
            process.join()
            del running[family]


def main(words: Sequence[str] | None = None) -> int:
    """Try the families and print what changed; 1 if anything became worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="write families.md and .zh.md to there")
    parser.add_argument("--accept", action="store_true", help="write the verdicts to verdicts.json")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for all numbers")
    args = parser.parse_args(words)
    found = {}
    for family, outcomes in results(args.families or FAMILIES, args.jobs):
        found[family] = outcomes
        print(family, ", ".join(f"{dtype} {outcomes[dtype]['verdict']}" for dtype in DTYPES), flush=True)
    found = dict(sorted(found.items()))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    worse, other = changes(found, known())
    for text in (*worse, *other):
        print(text)
    if args.accept:
        FILE.write_text(json.dumps(known() | verdicts_of(found), indent=1, sort_keys=True) + "\n", "utf-8")
    if args.pages and not args.families:
        write(args.pages, found, {"transformers": transformers.__version__, "peft": peft.__version__})
    return bool(worse) and not args.accept


if __name__ == "__main__":
    sys.exit(main())
