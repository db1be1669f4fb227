"""Adapters trained at once against one after the other: python -m bench.together [--json FILE]

Steps of N adapters over the demo's model, with one row of each adapter per step, of which the second half is trained
on. Both ways take turns in one process over the same base model; a figure is the median of the rounds. Seconds are of
CPU time with one thread, which other programs on the machine change least, and of the clock.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine, versions
from bench.state import Book, say
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.training import TrainingConfig
from lorasmith.loading.gguf import packaged_model
from lorasmith.loading.load import load_base
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.row import Example, Step
from lorasmith.model.verify import enable_fast_parts
from lorasmith.report import Report
from lorasmith.training.distributed import World
from lorasmith.training.loop import AT_ONCE
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import make_optimizer
from lorasmith.training.step import Learner, train_step, train_step_together

NEEDED = {"32": 1.5}  # times faster at rows of so many tokens


def main() -> int:
    """Measure, write after every figure, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.together", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("bench-together.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = {
        "command": " ".join(["python -m bench.together", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "needed": NEEDED, "threads": args.threads, "machine": machine("auto"), "versions": versions(),
    }  # fmt: skip
    book = Book(args.json.absolute(), head)
    for dtype in args.dtypes:
        base = load_base(ModelConfig(model=str(packaged_model("smollm2-135m-instruct", Report())), dtype=dtype))
        learners = [_learner(base, f"adapter-{i}") for i in range(max(args.adapters))]
        for adapters in args.adapters:
            for tokens in args.tokens:
                found = measure(base, learners[:adapters], tokens, args.rounds)
                book.put(dtype, f"{adapters} adapters, {tokens} tokens", found)
                say(f"{dtype} {adapters} adapters, {tokens} tokens: {found}")
    return 0


def _learner(base: Base, name: str) -> Callable[[int], Learner]:
    """A function that gives the adapter `name` a step with a row of so many tokens."""
    base.adapters[name] = inject(base.model, LoraConfig(), base.router, name)
    enable_fast_parts(base, name, range(100, 116))
    parameters = FlatParameters(base.adapters[name].trained)
    optimizer = make_optimizer(parameters, TrainingConfig())

    def of_tokens(tokens: int) -> Learner:
        ids = torch.randint(100, base.model.config.vocab_size, (tokens + 1,)).tolist()
        targets = [-100] * (tokens // 2) + ids[tokens // 2 + 1 :]
        example = Example(ids[:-1], targets, [1.0] * tokens, "bench")
        row = row_of(base, [example], example.weight, name)
        return Learner(parameters, optimizer, Step((row,), example.n_targets), 1.0)

    return of_tokens


def measure(base: Base, makers: list[Callable[[int], Learner]], tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step of all adapters, at once and one after the other."""
    learners, world = [make(tokens) for make in makers], World()

    def apart() -> None:
        for one in learners:
            train_step(base, one.parameters, one.optimizer, one.step, one.clip, world)

    def together() -> None:
        train_step_together(base, learners, AT_ONCE, world)

    ways = {"together": together, "apart": apart}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            cpu, clock = time.process_time(), time.perf_counter()
            run()
            if turn:  # the first one compiles kernels
                found[way].append((time.process_time() - cpu, time.perf_counter() - clock))
    cpu, clock = ({way: statistics.median(run[i] for run in runs) for way, runs in found.items()} for i in range(2))
    return {
        "cpu_seconds": cpu, "seconds": clock,
        "faster_by_cpu": cpu["apart"] / cpu["together"], "faster": clock["apart"] / clock["together"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
