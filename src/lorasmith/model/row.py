"""Packed rows: examples laid end to end without padding, with the positions and weights of their labels.

Training, evaluation and decoding all build their batches here. Nothing in this module knows texts or models.

    T = tokens of the row, N = labels of the row (tokens that are trained on)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, takewhile
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lorasmith.lora.router import Slice

SHARED = 8  # the shortest common prefix that is computed once; shorter ones cost more in extra spans than they save
IGNORED = -100  # the target of a token that is not trained on, as in transformers
# From the losses of a row's labels, [N], to the row's loss, a scalar, and its derivative by each of them, [N]. Both
# without gradient.
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


class Span(NamedTuple):
    """Tokens [start, end) of a row, which belong to one example or request, or are the common prefix of several.

    A token attends to the earlier ones of its span, of the parent span, of the parent's parent, and so on. When
    decoding, `past` earlier tokens of the request are in the KV cache, in slot `slot`.
    """

    start: int
    end: int
    past: int = 0
    slot: int = 0
    parent: int = -1  # index of the span that this one continues; -1: none, and it starts at position `past`

    @property
    def length(self) -> int:
        """Number of tokens in the row."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Example:
    """An encoded example.

    ids: token ids; targets: what each position must predict, or -100; weights: of each target in the loss. All three
    have the same length. source: where the example comes from, such as 'train.jsonl:812'. desirable: whether the answer
    is a good or a bad one; None where that is not known, as in all training but that on preferences.
    """

    ids: list[int]
    targets: list[int]
    weights: list[float]
    source: str
    desirable: bool | None = None

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.targets) == len(self.weights)

    @property
    def whole_ids(self) -> list[int]:
        """`ids` with the last target, which nothing follows; -100 if that is not trained on."""
        return [*self.ids, *self.targets[-1:]]

    @property
    def learned(self) -> list[int]:
        """The positions whose target is trained on."""
        return [i for i, target in enumerate(self.targets) if target != IGNORED]

    @property
    def n_targets(self) -> int:
        """Number of targets that are trained on."""
        return len(self.learned)

    @property
    def weight(self) -> float:
        """Sum of the weights of the targets that are trained on."""
        return sum(w for w, target in zip(self.weights, self.targets, strict=True) if target != IGNORED)

    @property
    def useful_length(self) -> int:
        """Tokens up to the last label; what follows cannot change the loss."""
        return max((i + 1 for i, target in enumerate(self.targets) if target != IGNORED), default=0)


@dataclass(frozen=True, slots=True)
class Row:
    """The input of one forward pass. Spans and slots are Python integers, so that no step waits for the device."""

    ids_T: Tensor  # int64
    position_T: Tensor  # position of each token in its example, int64
    spans: tuple[Span, ...]
    counts: tuple[int, ...]  # labels of each example or request
    at_N: Tensor  # row position of each label, int64
    target_N: Tensor  # token id of each label, int64
    weight_N: Tensor  # weight of each label in the loss; float64 on the CPU, else float32
    slots: tuple[Slice, ...]  # which adapter computes which tokens
    label_slots: tuple[Slice, ...] | None = None  # which computes which labels; None: a slot consists of whole spans

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.spans[-1].end if self.spans else 0

    @property
    def slots_of_labels(self) -> tuple[Slice, ...]:
        """Which adapter computes which labels, of a row with a single slot or with `label_slots`."""
        if self.label_slots is not None:
            return self.label_slots
        (slot,) = self.slots
        return (Slice(slot.adapter, 0, len(self.at_N)),) if len(self.at_N) else ()

    def to(self, device: torch.device) -> Self:
        """The same row with its tensors on `device`; copied asynchronously."""
        if device.type == "cpu":
            return self
        tensors = {name: getattr(self, name) for name in ("ids_T", "position_T", "at_N", "target_N", "weight_N")}
        tensors["weight_N"] = tensors["weight_N"].float()  # some devices have no float64
        return replace(self, **{name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()})


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: its rows on this rank, and the number of labels on all ranks together.

    objectives: what is minimized in each row; none: the sum of weight x token loss.
    """

    rows: tuple[Row, ...]
    targets: int
    objectives: tuple[Objective, ...] = ()


def flatten(
    examples: Sequence[Example],
    total_weight: float,
    adapter: str | None = "default",
    share: bool = False,
    multiple: int = 1,
    starts: Sequence[int] | None = None,
) -> Row:
    """Lay examples end to end in one row. Each is cut after its last label, which changes neither loss nor gradients.

    total_weight: the sum of all weights in the optimizer step, on all ranks. A label counts weight / total_weight, so
    that the losses of the rows add up to the same loss however the step is split into rows.
    share: include a common prefix of several examples only once. Loss and gradients stay the same.
    multiple: pad the row to a multiple of so many tokens, with a span that has no labels.
    starts: the position of each example from which on the adapter is active (see lora/alora.py); None: from the start.
    """
    ids = [example.ids[: example.useful_length] for example in examples]
    spans, places = _tree(ids if starts is None else _marked(ids, starts), SHARED if share else None)
    at = [places[e][i] for e, example in enumerate(examples) for i in example.learned]
    flat = {place: (ids[e][i], i) for e, line in enumerate(places) for i, place in enumerate(line)}
    filled = -(-len(flat) // multiple) * multiple
    if filled > len(flat):
        spans.append(Span(len(flat), filled))
        flat |= {len(flat) + i: (0, i) for i in range(filled - len(flat))}
    slots: tuple[Slice, ...] = (Slice(adapter, 0, len(flat)),)
    label_slots = None
    if starts is not None:
        active = {place for e, line in enumerate(places) for place in line[starts[e] :]}
        slots = slices_of([adapter if place in active else None for place in range(len(flat))])
        label_slots = slices_of([adapter if place in active else None for place in at])
    return Row(
        ids_T=torch.tensor([flat[place][0] for place in range(len(flat))], dtype=torch.long),
        position_T=torch.tensor([flat[place][1] for place in range(len(flat))], dtype=torch.long),
        spans=tuple(spans),
        counts=tuple(example.n_targets for example in examples),
        at_N=torch.tensor(at, dtype=torch.long),
        target_N=torch.tensor([e.targets[i] for e in examples for i in e.learned], dtype=torch.long),
        weight_N=torch.tensor([e.weights[i] / total_weight for e in examples for i in e.learned], dtype=torch.float64),
        slots=slots,
        label_slots=label_slots,
    )


def laid_length(examples: Sequence[Example], share: bool) -> int:
    """The number of tokens of a row of these examples."""
    ids = [example.ids[: example.useful_length] for example in examples]
    spans, _places = _tree(ids, SHARED if share else None)
    return spans[-1].end if spans else 0


def join(rows: Sequence[Row]) -> Row:
    """Lay rows of different adapters end to end in one row, whose loss is the sum of theirs.

    Each row has a single slot or `label_slots`, as `flatten` makes them.
    """
    starts = list(accumulate((row.tokens for row in rows), initial=0))
    labels = list(accumulate((len(row.at_N) for row in rows), initial=0))
    firsts = list(accumulate((len(row.spans) for row in rows), initial=0))
    return Row(
        ids_T=torch.cat([row.ids_T for row in rows]),
        position_T=torch.cat([row.position_T for row in rows]),
        spans=tuple(
            span._replace(
                start=span.start + start, end=span.end + start, parent=span.parent + first if span.parent >= 0 else -1
            )
            for row, start, first in zip(rows, starts, firsts, strict=False)
            for span in row.spans
        ),
        counts=tuple(count for row in rows for count in row.counts),
        at_N=torch.cat([row.at_N + start for row, start in zip(rows, starts, strict=False)]),
        target_N=torch.cat([row.target_N for row in rows]),
        weight_N=torch.cat([row.weight_N for row in rows]),
        slots=_moved_slices([row.slots for row in rows], starts),
        label_slots=_moved_slices([row.slots_of_labels for row in rows], labels),
    )


def _moved_slices(slices: Sequence[Sequence[Slice]], starts: Sequence[int]) -> tuple[Slice, ...]:
    return tuple(
        Slice(one.adapter, one.start + start, one.end + start)
        for own, start in zip(slices, starts, strict=False)
        for one in own
        if one.end > one.start
    )


def _marked(ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[tuple[int, bool]]]:
    """Each token with whether it is active: a prefix is common only if that is the same."""
    return [[(token, i >= start) for i, token in enumerate(text)] for text, start in zip(ids, starts, strict=True)]


def slices_of(adapters: Iterable[str | None]) -> tuple[Slice, ...]:
    """The slices of tokens or labels that have these adapters one by one."""
    slices, end = list[Slice](), 0
    for adapter, run in groupby(adapters):
        start, end = end, end + sum(1 for _one in run)
        slices.append(Slice(adapter, start, end))
    return tuple(slices)


def _tree(ids: Sequence[Sequence[Any]], shared: int | None) -> tuple[list[Span], list[list[int]]]:
    """Spans, and the row positions of each example's tokens. Common prefixes of at least `shared` are laid once."""
    spans: list[Span] = []
    places: list[list[int]] = [[] for _example in ids]

    def lay(members: Sequence[int], depth: int, parent: int) -> None:
        same_prefix: dict[tuple[Any, ...], list[int]] = {}
        for e in members:
            same_prefix.setdefault(tuple(ids[e][depth : depth + shared]) if shared else (), []).append(e)
        for prefix, some in same_prefix.items():
            if len(some) > 1 and len(prefix) == shared:
                end = depth + _common_prefix([ids[e][depth:] for e in some])
                lay(some, end, add(some, depth, end, parent))
            else:
                for e in some:
                    add([e], depth, len(ids[e]), parent)

    def add(members: Sequence[int], depth: int, end: int, parent: int) -> int:
        start = spans[-1].end if spans else 0
        if end > depth:
            spans.append(Span(start, start + end - depth, parent=parent))
            for e in members:
                places[e] += range(start, start + end - depth)
        return len(spans) - 1

    lay(range(len(ids)), 0, -1)
    return spans, places


def _common_prefix(texts: Sequence[Any]) -> int:
    """Length of the longest common prefix: that of the first and the last in lexicographic order."""
    ordered = sorted(texts)
    return sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False)))
