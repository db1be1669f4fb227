"""`make bench-serve`, or `python -m bench.serving`: closed loops in both dtypes, then a server under load.

Nothing else should run on the machine meanwhile. Writes JSON after each part, and prints the table.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

from bench.machine import machine, versions
from bench.serving import names
from bench.serving.closed import closed
from bench.serving.table import render
from bench.serving.under_load import under_load
from bench.state import Book, say


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="bench-serve.json")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapters", type=Path, help="where the adapters are kept between runs")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--only", nargs="+", default=["float32", "bfloat16", "load"])
    args = parser.parse_args()
    head = {"date": datetime.now().isoformat(timespec="minutes"), "machine": machine("auto"), "versions": versions()}
    book = Book(Path(args.json).absolute(), head)
    with ExitStack() as stack:
        folder = args.adapters or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorasmith-serve-")))
        say(f"{args.count} adapters, each trained to say its name")
        names.make(folder, args.model, args.count)
        folders = [folder / names.name_of(number) for number in range(args.count)]
        for dtype in [dtype for dtype in ("float32", "bfloat16") if dtype in args.only]:
            if dtype == "bfloat16" and book.data["machine"]["kind"] != "bfloat16":
                book.leave_out(dtype, "this processor has no products in bfloat16")
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # so that no memory is reused
                book.put("closed", dtype, alone.submit(closed, args.model, dtype, folders, args.rounds).result())
        if "load" in args.only:
            book.put("load", "open", under_load(args.model, folder, args.count, args.requests))
    print(render(book.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
