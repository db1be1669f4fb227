"""Our own training in one process: each step's time, its limit in the same moment, and a breakdown by part.

python -m bench.parts --rows chat --count 96

It is `lorasmith train` itself; the limit is timed between its steps, where it reports its progress.
"""

import lorasmith.cli.main  # isort: skip  # noqa: F401  before torch: it decides how torch's threads wait for each other

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import commands
from bench.breakdown import parts_of
from bench.products import Products, Size, linear_layers
from bench.rows import KINDS, Kind, Rows, examples, records_of
from lorasmith.cli import train as train_verb
from lorasmith.cli.flags import config_of
from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config
from lorasmith.data.dataset.plan import plan
from lorasmith.i18n import _
from lorasmith.loading.folder import find_folder
from lorasmith.loading.tokenizer import load_tokenizer
from lorasmith.model.row import flatten
from lorasmith.report import Report
from lorasmith.runs.train import train
from lorasmith.training.run_files import ENVIRONMENT

WARM = 2  # steps that are not measured
PROFILED = 0.25  # of the others, at the end


class Plan:
    """What each step of a run will hold: its tokens, and what it asks of the products."""

    def __init__(self, config: Config, kind: Kind, model: Path, layout: Any) -> None:
        self.rows = examples(Path(config.data.data[0]), kind, model, load_tokenizer(model))
        lengths, targets = [row.useful_length for row in self.rows], [row.n_targets for row in self.rows]
        self.plan = plan(lengths, targets, config.training, config.training.seed, layout)
        self.share = layout == "packed"

    def tokens(self, k: int) -> int:
        """Tokens of step k as they stand in the data."""
        return sum(len(self.rows[i].ids) for i in self.plan.members(k))

    def sizes(self, k: int) -> list[Size]:
        """Tokens and labels of step k's flat rows."""
        rows = (flatten([self.rows[i] for i in members], 1.0, share=self.share) for members in self.plan[k])
        return [Size(row.tokens, len(row.at_N)) for row in rows]


class Watch(Report):
    """Told of every step by the training: times it, times its products, and profiles the last ones."""

    def __init__(self, config: Config, kind: Kind) -> None:
        self.config, self.kind, self.model = config, kind, find_folder(config.model.model, Report())
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.seconds: list[float] = []  # of each step; the first one's is not known
        self.limit: list[float] = []
        self.operations: list[int] = []
        self.last = 0.0

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """`done` steps are done."""
        if task != _("training"):
            return
        self.seconds.append(time.perf_counter() - self.last)
        if done == 1:
            self._prepare(total)
        if done <= self.timed_until:
            self.limit.append(self.products.seconds(self.plan.sizes(done - 1)))
            self.operations.append(self.products.operations)
        if done == self.timed_until:
            self.profiler.start()
        if done == total:
            self.profiler.stop()
        self.last = time.perf_counter()

    def _prepare(self, total: int) -> None:
        if total < WARM + 2:
            raise ValueError(f"{total} steps are too few; needs {WARM + 2}")
        self.timed_until = total - max(1, int(PROFILED * (total - WARM)))
        self.environment = json.loads((Path(str(self.config.output)) / ENVIRONMENT).read_text("utf-8"))
        self.plan = Plan(self.config, self.kind, self.model, self.environment["layout"])
        sizes = [size for k in range(total) for size in self.plan.sizes(k)]
        largest = Size(max(size.tokens for size in sizes), max(size.labels for size in sizes))
        layers = linear_layers(self.model, self.config.lora)
        self.products = Products(layers, getattr(torch, self.environment["dtype"]), largest)

    def figures(self, trained: int) -> dict[str, Any]:
        """What was found; `trained`: how many numbers the adapter has."""
        timed = range(WARM, self.timed_until)
        seconds, limit = self.seconds[WARM : self.timed_until], self.limit[WARM:]
        tokens, sizes = sum(map(self.plan.tokens, timed)), [size for k in timed for size in self.plan.sizes(k)]
        profiled = self.seconds[self.timed_until :]
        parts = parts_of(self.profiler.events() or (), sum(profiled), self.config.lora.r, trained)
        return {
            **{name: self.environment[name] for name in ("dtype", "layout", "threads")},
            "steps": len(timed),
            "tokens_per_step": tokens / len(timed),
            "computed_per_step": sum(size.tokens for size in sizes) / len(timed),
            "labels_per_step": sum(size.labels for size in sizes) / len(timed),
            "seconds_per_step": sum(seconds) / len(timed),
            "limit_seconds_per_step": sum(limit) / len(timed),
            "limit_gflops": sum(self.operations[WARM:]) / sum(limit) / 1e9,
            "tokens_per_second": tokens / sum(seconds),
            "limit_tokens_per_second": tokens / sum(limit),
            "share": statistics.median(least / taken for least, taken in zip(limit, seconds, strict=True)),
            "profiled": {
                "steps": len(profiled),
                "seconds_per_step": sum(profiled) / len(profiled),
                "parts": {part: whole / len(profiled) for part, whole in parts.items()},
            },
        }


def measure(model: str, dtype: str, kind: Kind, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Train on the rows as the command line does, and watch. Needs at least WARM + 2 steps."""
    with tempfile.TemporaryDirectory() as folder:
        file = Rows(kind, records, Path(model), Path(folder)).file(len(records))
        words = commands.our_training(model, kind, dtype, commands.DEMO)(file, Path(folder)).words
        args, problems = train_verb.parser().read(words[words.index("train") + 1 :])
        assert not problems, problems
        watch = Watch(config_of(args), kind)
        summary = train(watch.config, watch)
        return watch.figures(summary.trainable_parameters)


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", choices=KINDS, default="chat")
    parser.add_argument("--count", type=int, default=96, help="how many rows; eight are a step")
    parser.add_argument("--model", default=ModelConfig().model)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="JSON file; stdout where not given")
    args = parser.parse_args()
    records = records_of(KINDS[args.rows])
    if records is None:
        parser.error("the alpaca rows are not there")
    text = json.dumps(measure(args.model, args.dtype, KINDS[args.rows], records[: args.count]), indent=2) + "\n"
    if args.output:
        args.output.write_text(text, "utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
