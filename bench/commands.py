"""The words that start either program, each from its command line."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.programs import ROOT
from bench.rates import RECIPE
from bench.rows import Kind

USUAL_BEST = "float32, 8 x 1"  # of the four the fastest wherever it was measured
TRAINING: dict[str, list[str]] = {  # rows of a micro-batch x micro-batches of a step
    RECIPE: ["--dtype", "float32", "--batch", "1", "--accumulate", "8"],
    USUAL_BEST: ["--dtype", "float32", "--batch", "8", "--accumulate", "1"],
    "bfloat16 weights, 1 x 8": ["--dtype", "bfloat16", "--batch", "1", "--accumulate", "8"],
    "bfloat16 weights and autocast, 1 x 8": ["--dtype", "bfloat16", "--batch", "1", "--accumulate", "8", "--autocast"],
}
EVALUATION: dict[str, list[str]] = {
    f"{dtype}, {batch} at a time": ["--evaluate", "--dtype", dtype, "--batch", str(batch)]
    for dtype in ("float32", "bfloat16")
    for batch in (8, 1)
}
# A step of the demo is eight rows; nothing is saved on the way, and the shortest run learns too.
DEMO = ["--learning-rate", "2e-3", "--warmup", "0", "--save-every", "0"]
TUTORIAL = ["--config", str(ROOT / "examples/tutorial/tutorial.toml"), "--warmup", "0", "--save-every", "0"]
_OURS = "import sys; from lorasmith.cli.main import main; sys.exit(main())"


class Launch(NamedTuple):
    """The words of a program, and the file that it writes just before its first step."""

    words: list[str]
    marker: Path | None = None


Program = Callable[[Path, Path], Launch]  # a file of rows and an empty folder to write in -> what to run


def without_bfloat16(settings: Mapping[str, list[str]], kind: str) -> dict[str, list[str]]:
    """A processor without bfloat16 products takes ten times as long for them: there its settings are left out."""
    return {name: words for name, words in settings.items() if kind == "bfloat16" or "bfloat16" not in name}


def ours(verb: str, *words: str) -> list[str]:
    """`lorasmith VERB` from the command line."""
    return [sys.executable, "-c", _OURS, verb, *words]


def our_training(model: str, rows: Kind, dtype: str, flags: Sequence[str]) -> Program:
    """`lorasmith train`; config.toml is written once everything is loaded, just before the first step."""

    def launch(data: Path, scratch: Path) -> Launch:
        output = scratch / "run"
        words = ["--data", str(data), "--model", model, "--output", str(output), "--held-out", "0", "--dtype", dtype]
        return Launch(ours("train", *words, *rows.flags, "--too-long", "truncate", *flags), output / "config.toml")

    return launch


def our_evaluation(run: Path, rows: Kind) -> Program:
    """`lorasmith eval`: base and adapter on the same rows."""

    def launch(data: Path, _scratch: Path) -> Launch:
        limits = ["--max-length", str(rows.max_length), "--too-long", "truncate"]
        return Launch(ours("eval", str(run), str(data), *limits))

    return launch


def peer(model: Path, rows: Kind, setting: Sequence[str], lora: str = "demo") -> Program:
    """PEFT with Trainer at one of its settings."""

    def launch(data: Path, scratch: Path) -> Launch:
        marker = None if "--evaluate" in setting else scratch / "first-step"
        words = ["--data", str(data), "--model", str(model), "--output", str(scratch), "--lora", lora]
        words += ["--marker", str(marker)] if marker else []
        return Launch([sys.executable, "-m", "bench.peer", *words, *rows.flags, *setting], marker)

    return launch
