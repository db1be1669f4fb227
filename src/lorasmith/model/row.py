"""The one layout: examples end to end in a flat row, with the places of their labels.

    T = tokens of the row, N = learned tokens of the row

It knows no text and no model. Training, evaluation and decoding all make their rows here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lorasmith.lora.router import Slice

SHARED = 8  # tokens that examples must begin with alike, to be computed once: fewer cost more in pieces than they save
IGNORED = -100  # a target that is not learned, as everywhere in the field


class Span(NamedTuple):
    """Tokens [start, end) of the row belong to one example or request, or to several that begin alike.

    A token sees the earlier ones of its span, of the span that this one continues, and so on. `past` tokens of a
    request stand in the key/value cache already, in place `slot`.
    """

    start: int
    end: int
    past: int = 0
    slot: int = 0
    parent: int = -1  # which span of the row this one continues; -1: it begins with position `past`

    @property
    def length(self) -> int:
        """Tokens of this span in the row."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row of data. `targets[i]` is what position i must predict, or -100; as long as `ids`."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    source: str

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.targets) == len(self.weights)

    @property
    def learned(self) -> list[int]:
        """The places of the learned tokens."""
        return [i for i, target in enumerate(self.targets) if target != IGNORED]

    @property
    def n_targets(self) -> int:
        """How many tokens are learned."""
        return len(self.learned)

    @property
    def weight(self) -> float:
        """The sum of the weights of the learned tokens."""
        return sum(w for w, target in zip(self.weights, self.targets, strict=True) if target != IGNORED)

    @property
    def useful_length(self) -> int:
        """Tokens up to the last learned one: nothing after it can change the loss."""
        return max((i + 1 for i, target in enumerate(self.targets) if target != IGNORED), default=0)


@dataclass(frozen=True, slots=True)
class Row:
    """What one forward needs. Spans and slots are Python integers, so that no step waits for the device."""

    ids_T: Tensor
    position_T: Tensor
    spans: tuple[Span, ...]
    counts: tuple[int, ...]  # learned tokens of each example or request
    at_N: Tensor
    target_N: Tensor
    weight_N: Tensor
    slots: tuple[Slice, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.spans[-1].end if self.spans else 0

    def to(self, device: torch.device) -> Self:
        """The same row with its tensors on `device`, without waiting."""
        if device.type == "cpu":
            return self
        tensors = {name: getattr(self, name) for name in ("ids_T", "position_T", "at_N", "target_N", "weight_N")}
        tensors["weight_N"] = tensors["weight_N"].float()  # some devices have no float64; the CPU's tests need it
        return replace(self, **{name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()})


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its rows on this rank, and the learned tokens over all ranks."""

    rows: tuple[Row, ...]
    targets: int


def flatten(
    examples: Sequence[Example],
    total_weight: float,
    adapter: str | None = "default",
    share: bool = False,
    multiple: int = 1,
) -> Row:
    """Lay examples end to end, each cut after its last learned token, which changes no loss and no gradient.

    `total_weight` is the sum of weights over the whole step and all ranks: a token counts weight / total_weight,
    so that any split of a step into rows adds up to the same loss. With `share`, what several examples begin with
    stands once, and a token learned there once for each of them: the same loss and gradients from fewer tokens.
    The row is filled up to a `multiple` of tokens with a span from which nothing is learned.
    """
    ids = [example.ids[: example.useful_length] for example in examples]
    spans, places = _tree(ids, SHARED if share else None)
    at = [places[e][i] for e, example in enumerate(examples) for i in example.learned]
    flat = {place: (ids[e][i], i) for e, line in enumerate(places) for i, place in enumerate(line)}
    filled = -(-len(flat) // multiple) * multiple
    if filled > len(flat):
        spans.append(Span(len(flat), filled))
        flat |= {len(flat) + i: (0, i) for i in range(filled - len(flat))}
    return Row(
        ids_T=torch.tensor([flat[place][0] for place in range(len(flat))], dtype=torch.long),
        position_T=torch.tensor([flat[place][1] for place in range(len(flat))], dtype=torch.long),
        spans=tuple(spans),
        counts=tuple(example.n_targets for example in examples),
        at_N=torch.tensor(at, dtype=torch.long),
        target_N=torch.tensor([e.targets[i] for e in examples for i in e.learned], dtype=torch.long),
        weight_N=torch.tensor([e.weights[i] / total_weight for e in examples for i in e.learned], dtype=torch.float64),
        slots=(Slice(adapter, 0, len(flat)),),
    )


def _tree(ids: list[list[int]], shared: int | None) -> tuple[list[Span], list[list[int]]]:
    """Spans, and each example's places in the row. What begins with the same `shared` tokens or more stands once."""
    spans: list[Span] = []
    places: list[list[int]] = [[] for _example in ids]

    def lay(members: Sequence[int], depth: int, parent: int) -> None:
        alike: dict[tuple[int, ...], list[int]] = {}
        for e in members:
            alike.setdefault(tuple(ids[e][depth : depth + shared]) if shared else (), []).append(e)
        for begin, some in alike.items():
            if len(some) > 1 and len(begin) == shared:
                end = depth + _common([ids[e][depth:] for e in some])
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


def _common(texts: list[list[int]]) -> int:
    """How many tokens all of them begin with alike: what the first and the last in order do."""
    ordered = sorted(texts)
    return sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False)))
