"""Held-out evaluation: `lorasmith eval` beside Trainer.evaluate at its best."""

import tempfile
from pathlib import Path

from bench import commands
from bench.contest import Contest, hold
from bench.programs import run
from bench.rows import CHAT
from bench.state import STEP, Bench, say
from bench.training import rows_of

COUNTS, SEARCH, QUICK = (32, 128), (16, 64), (8, 56)
BOTH = 2  # lorasmith measures base and adapter, Trainer the adapter alone


def evaluation(bench: Bench) -> None:
    """The demo's rows; an adapter of one step will do, since its numbers do not decide the time."""
    rows = rows_of(bench, CHAT, bench.model)
    counts, search, quick = (bench.rows(*pair) for pair in (COUNTS, SEARCH, QUICK))
    settings = commands.without_bfloat16(commands.EVALUATION, bench.kind)
    if bench.quick:
        settings = dict(list(settings.items())[:1])
        counts = search = quick
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        say("training an adapter to evaluate")
        training = commands.our_training(str(bench.model), CHAT, bench.dtype, commands.DEMO)
        run(training(rows.file(STEP), Path(folder)).words)
        hold(
            bench,
            Contest(
                section="evaluation",
                name="chat",
                ours=commands.our_evaluation(Path(folder) / "run", CHAT),
                peer=lambda words: commands.peer(bench.model, CHAT, words),
                settings=settings,
                rows=rows,
                counts=counts,
                search=search,
                passes=BOTH,
            ),
        )
