"""Training beside the peer: the demo's rows, alpaca rows, the tutorial's Bloom, and a larger model."""

import sys
from pathlib import Path

from bench import commands
from bench.contest import Contest, hold
from bench.programs import Missing, run
from bench.rates import RECIPE
from bench.rows import ALPACA, CHAT, Kind, Rows, records_of
from bench.state import Bench, say

# Rows of the two runs, the same while trying the peer's settings, and both with --quick. Alpaca rows are twice as long.
COUNTS = {"chat": ((32, 128), (16, 64), (8, 32)), "alpaca": ((16, 64), (8, 32), (8, 24))}
BLOOM, LARGER = (8, 32), (16, 48)


def training(bench: Bench, name: str) -> None:
    """The demo's model on rows of one kind, against the best of the peer's settings."""
    kind = CHAT if name == "chat" else ALPACA
    counts, search, quick = (bench.rows(*pair) for pair in COUNTS[name])
    settings = commands.without_bfloat16(commands.TRAINING, bench.kind)
    if bench.quick:
        settings = {setting: settings[setting] for setting in (RECIPE, commands.USUAL_BEST)}
        counts = search = quick
    hold(
        bench,
        Contest(
            section="training",
            name=name,
            ours=commands.our_training(str(bench.model), kind, bench.dtype, commands.DEMO),
            peer=lambda words: commands.peer(bench.model, kind, words),
            settings=settings,
            rows=rows_of(bench, kind, bench.model),
            counts=counts,
            search=search,
        ),
    )


def bloom(bench: Bench) -> None:
    """The tutorial's recipe on a Bloom of its shape; the peer as the tutorial runs it."""
    rows_of(bench, ALPACA, bench.model)  # its tokenizer is learned from them
    model = make_model(bench, "bloom")
    counts = bench.rows(*BLOOM)
    hold(
        bench,
        Contest(
            section="bloom",
            name="alpaca",
            ours=commands.our_training(str(model), ALPACA, bench.dtype, commands.TUTORIAL),
            peer=lambda words: commands.peer(model, ALPACA, words, "tutorial"),
            settings={RECIPE: commands.TRAINING[RECIPE]},
            rows=rows_of(bench, ALPACA, model),
            counts=counts,
            search=counts,
        ),
    )


def sizes(bench: Bench) -> None:
    """A model of 360 million weights on the demo's rows; growth is against what `training` found for the demo's."""
    model = make_model(bench, "larger")
    counts, before = bench.rows(*LARGER), bench.book.get("training", "chat")
    best = before["peer"]["setting"] if "peer" in before else commands.USUAL_BEST
    hold(
        bench,
        Contest(
            section="sizes",
            name="360M",
            ours=commands.our_training(str(model), CHAT, bench.dtype, commands.DEMO),
            peer=lambda words: commands.peer(model, CHAT, words),
            settings={best: commands.TRAINING[best]},
            rows=rows_of(bench, CHAT, model),
            counts=counts,
            search=counts,
        ),
    )
    after = bench.book.get("sizes", "360M")
    growth = {
        side: before[side]["tokens_per_second"] / after[side]["tokens_per_second"]
        for side in ("ours", "peer")
        if side in before and side in after
    }
    bench.book.put("sizes", "360M", after | {"times_slower": growth})


def rows_of(bench: Bench, kind: Kind, model: Path) -> Rows:
    """Rows of one kind as both programs get them. Raises Missing where their file is not there."""
    records = records_of(kind)
    if records is None:
        raise Missing("../shared/data/alpaca_zh_demo.json is not there")
    folder = bench.scratch / f"rows-{model.name}"
    folder.mkdir(exist_ok=True)
    return Rows(kind, records, model, folder)


def make_model(bench: Bench, which: str) -> Path:
    """The folder of a random model, made once."""
    folder = bench.scratch / which
    if not folder.is_dir():
        say(f"writing {which} with random weights")
        run([sys.executable, "-m", "bench.models", which, str(folder), "--demo", str(bench.model)])
    return folder
