"""Which rows are held out, and which of the others are trained on: random samples that depend on a seed only."""

import random
from collections.abc import Callable

from lorasmith.data.dataset.fit import DataSplit, rows_text
from lorasmith.errors import DataError
from lorasmith.i18n import _

MAX_HELD_OUT = 200  # rows held out by a fraction: more cost time and tell little

Say = Callable[[str], None]  # passes on a message


def hold_out(train: DataSplit, share: float | str, seed: int, say: Say) -> DataSplit:
    """Move a random sample of the rows of `train`, which depends on the seed only, into a split of their own."""
    assert isinstance(share, float)
    rows = train.rows
    count = int(share) if share >= 1 else min(MAX_HELD_OUT, int(round(share * len(rows), 6)))
    if count >= len(rows):
        raise DataError(
            _(
                "data.held_out: holding out {count} of {rows} rows leaves none to train on. Hold out fewer.",
                count=f"{count:,}",
                rows=f"{len(rows):,}",
            )
        )
    if share and not count:
        say(
            _(
                "No rows are held out: the fraction {share} of {rows} is less than one row.",
                share=share,
                rows=rows_text(len(rows)),
            )
        )
    order = list(range(len(rows)))
    random.Random(f"held-out-{seed}").shuffle(order)
    chosen = set(order[:count])
    places_held_out = sorted(chosen)
    held_out = DataSplit(
        "data.held_out", [train.conversations[i] for i in places_held_out], [rows[i] for i in places_held_out]
    )
    train.conversations = [one for i, one in enumerate(train.conversations) if i not in chosen]
    train.rows = [row for i, row in enumerate(rows) if i not in chosen]
    return held_out


def keep_some(train: DataSplit, wanted: float | None, seed: int, say: Say) -> None:
    """Leave `wanted` rows to train on; with the same seed, fewer are a part of more. Raises DataError if none is left.

    wanted: a number of rows above 1, a fraction of them up to 1, or None for all.
    """
    count, rows = len(train.rows), train.rows
    if wanted is None or wanted >= count:
        return
    kept = int(wanted) if wanted > 1 else int(round(wanted * count, 6))
    if not kept:
        raise DataError(
            _(
                "data.train_rows: the fraction {share:g} of {rows} is less than one row. Raise it.",
                share=wanted,
                rows=rows_text(count),
            )
        )
    order = list(range(count))
    random.Random(f"train-rows-{seed}").shuffle(order)
    places_kept = sorted(order[:kept])
    train.rows = [rows[i] for i in places_kept]
    train.conversations = [train.conversations[i] for i in places_kept]
    say(_("Training on {kept} of {rows}, a random sample.", kept=f"{kept:,}", rows=rows_text(count)))
