"""The plan of a training: which examples are in which row of which optimizer step.

The whole plan follows from lengths, options and seed, and is known before the first step. A run therefore resumes from
a step number alone, the remaining time can be told, and every rank computes its share of a step by itself. The plan
does not depend on the number of ranks.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

Layout = Literal["packed", "padded"]

PADDED_ROWS = 2  # examples of similar length in one padded micro-batch; padding is then 9% of its tokens


class StepOptions(Protocol):
    """The options of a training that the plan follows from."""

    @property
    def batch_size(self) -> int:
        """Examples per micro-batch."""

    @property
    def accumulate(self) -> int:
        """Micro-batches per step."""

    @property
    def epochs(self) -> float:
        """Passes over the examples, if max_steps is None."""

    @property
    def max_steps(self) -> int | None:
        """Number of steps; takes precedence over epochs."""

    @property
    def row_tokens(self) -> int:
        """Tokens per row."""


@dataclass(frozen=True)
class Plan:
    """`plan[k]` is the rows of optimizer step k, each a list of example indices; `len(plan)` the number of steps.

    lengths, n_targets: tokens and target tokens of each example. step_examples: examples per step; the last step of an
    epoch may have fewer. row_tokens: most tokens of a row, padding included; a longer example gets a row of its own.
    """

    lengths: tuple[int, ...]
    n_targets: tuple[int, ...]
    steps: int
    step_examples: int
    row_tokens: int
    seed: int
    layout: Layout

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> list[list[int]]:
        """Rows of step k, the fullest first, so that a lack of memory shows early. Raises IndexError."""
        return self._rows(self.members(k))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the examples."""
        return math.ceil(len(self.lengths) / self.step_examples)

    def members(self, k: int) -> list[int]:
        """Examples of step k, in the shuffled order of its epoch. Raises IndexError."""
        if not 0 <= k < self.steps:
            raise IndexError(k)
        epoch, place = divmod(k, self.steps_per_epoch)
        order = _order(len(self.lengths), self.seed, epoch)
        return list(order[place * self.step_examples : (place + 1) * self.step_examples])

    def targets(self, k: int) -> int:
        """Target tokens of step k, over all ranks."""
        return sum(self.n_targets[i] for i in self.members(k))

    def epoch(self, k: int) -> float:
        """Epochs completed after step k; a whole number exactly at the end of an epoch."""
        epoch, place = divmod(k, self.steps_per_epoch)
        return epoch + min(1.0, (place + 1) * self.step_examples / len(self.lengths))

    def of_rank(self, k: int, rank: int, world: int) -> list[list[int]]:
        """Rows of step k that `rank` computes, one of `world` processes; may be empty.

        Examples are distributed rather than rows: a step of a few short examples is a single row, and the other
        processes would have nothing to do.
        """
        members = self.members(k)
        mine = set(_distribute([self.lengths[i] for i in members], world)[rank])
        return self._rows([i for place, i in enumerate(members) if place in mine])

    def total(self, values: Sequence[int], since: int = 0) -> int:
        """The sum of `values`, one an example, over all steps from `since` on; whole epochs are multiplied."""
        return self._until(values, self.steps) - self._until(values, since)

    def _until(self, values: Sequence[int], k: int) -> int:
        epoch, place = divmod(k, self.steps_per_epoch)
        order = _order(len(self.lengths), self.seed, epoch)[: place * self.step_examples] if place else ()
        return epoch * sum(values) + sum(values[i] for i in order)

    def _rows(self, members: Sequence[int]) -> list[list[int]]:
        rows = pack_rows([self.lengths[i] for i in members], self.row_tokens, self.layout)
        return [[members[i] for i in row] for row in rows]


def plan(lengths: Sequence[int], n_targets: Sequence[int], cfg: StepOptions, seed: int, layout: Layout) -> Plan:
    """The plan of one training. lengths: tokens of each example up to its last target (`useful_length`).

    Raises ValueError without examples.
    """
    if not lengths or len(lengths) != len(n_targets):
        raise ValueError(f"{len(lengths)} lengths and {len(n_targets)} counts of targets")
    step_examples = cfg.batch_size * cfg.accumulate
    per_epoch = math.ceil(len(lengths) / step_examples)
    # Rounded first: 1.1 x 10 is 11.000000000000002, and that is 11 steps.
    steps = cfg.max_steps or max(1, math.ceil(round(cfg.epochs * per_epoch, 6)))
    return Plan(tuple(lengths), tuple(n_targets), steps, step_examples, cfg.row_tokens, seed, layout)


def pack_rows(lengths: Sequence[int], row_tokens: int, layout: Layout) -> list[list[int]]:
    """Put examples 0, 1, ... into rows of at most `row_tokens` tokens, the longest first; a longer one is alone."""
    members = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return _packed(lengths, members, row_tokens) if layout == "packed" else _padded(lengths, members, row_tokens)


def _distribute(lengths: Sequence[int], world: int) -> list[list[int]]:
    """Split examples 0, 1, ... into `world` shares: the longest first, each to the share with the fewest tokens."""
    shares: list[list[int]] = [[] for _rank in range(world)]
    tokens = [0] * world
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        shares[least].append(place)
        tokens[least] += lengths[place]
    return shares


def _packed(lengths: Sequence[int], members: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Bin packing by first-fit decreasing."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in members:
        fitting = (row for row, left in enumerate(room) if lengths[i] <= left)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def _padded(lengths: Sequence[int], members: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of examples of similar length; all of a row are padded to its first, the longest."""
    rows: list[list[int]] = []
    for i in members:
        row = rows[-1] if rows else []
        if 0 < len(row) < PADDED_ROWS and (len(row) + 1) * lengths[row[0]] <= row_tokens:
            row.append(i)
        else:
            rows.append([i])
    return rows


@lru_cache(maxsize=4)
def _order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    random.Random(f"{seed}-{epoch}").shuffle(order)  # a string is hashed the same way on every machine
    return tuple(order)
