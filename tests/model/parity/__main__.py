"""Try every causal family of transformers, and write docs/families.md."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lorasmith.errors import first_line
from tests.model.parity.configs import FAMILIES
from tests.model.parity.trial import DTYPES, trial

SECONDS = 60


def _child(family, dtypes, pipe):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        with tempfile.TemporaryDirectory(prefix="lorasmith-parity-") as folder:
            found = {dtype: asdict(outcome) for dtype, outcome in trial(family, Path(folder), dtypes).items()}
    except Exception as error:
        import traceback
        found = {"*": {"verdict": "not built", "why": f"{type(error).__name__}: {first_line(error)}", "tb": traceback.format_exc()[-1500:]}}
    pipe.send(found)
    pipe.close()
    os._exit(0)


def all_of(families: Sequence[str], dtypes, jobs: int):
    context = multiprocessing.get_context("fork")
    waiting, running, found = list(families), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(family, dtypes, theirs))
            process.start()
            theirs.close()
            running[family] = process, ours, time.monotonic()
        time.sleep(0.05)
        for family, (process, pipe, start) in list(running.items()):
            if pipe.poll():
                try:
                    found[family] = pipe.recv()
                except EOFError:
                    found[family] = {"*": {"verdict": "not built", "why": "the process ended"}}
            elif time.monotonic() - start > SECONDS:
                process.kill()
                found[family] = {"*": {"verdict": "not built", "why": f"takes longer than {SECONDS} seconds"}}
            else:
                continue
            process.join()
            del running[family]
            found[family]["seconds"] = round(time.monotonic() - start, 1)
            print(family, {k: (v["verdict"], list(v.get("problems", v.get("why")))) if isinstance(v, dict) else v for k, v in found[family].items()}, flush=True)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(words)
    found = all_of(args.families or FAMILIES, tuple(args.dtypes.split(",")), args.jobs)
    if args.results:
        args.results.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    else:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
