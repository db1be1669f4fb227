"""The one layout: examples end to end in a flat row, with the places of their labels.

    T = tokens of the row, N = learned tokens of the row

It knows no text and no model. Training, evaluation and decoding all make their rows here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lorasmith.lora.router import Slice

IGNORED = -100  # a target that is not learned, as everywhere in the field


class Span(NamedTuple):
    """Tokens [start, end) of the row belong to one example or request and see only each other.

    `past` tokens of it stand in the key/value cache already, in place `slot`.
    """

    start: int
    end: int
    past: int = 0
    slot: int = 0

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
    def n_targets(self) -> int:
        """How many tokens are learned."""
        return sum(target != IGNORED for target in self.targets)

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
    counts: tuple[int, ...]  # learned tokens of each span
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


def flatten(examples: Sequence[Example], total_weight: float, adapter: str | None = "default") -> Row:
    """Lay examples end to end, each cut after its last learned token, which changes no loss and no gradient.

    `total_weight` is the sum of weights over the whole step and all ranks: a token counts weight / total_weight,
    so that any split of a step into rows adds up to the same loss.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    at: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for example in examples:
        start, length = len(ids), example.useful_length
        ids += example.ids[:length]
        positions += range(length)
        spans.append(Span(start, start + length))
        for i in range(length):
            if example.targets[i] != IGNORED:
                at.append(start + i)
                targets.append(example.targets[i])
                weights.append(example.weights[i] / total_weight)
    return Row(
        ids_T=torch.tensor(ids, dtype=torch.long),
        position_T=torch.tensor(positions, dtype=torch.long),
        spans=tuple(spans),
        counts=tuple(example.n_targets for example in examples),
        at_N=torch.tensor(at, dtype=torch.long),
        target_N=torch.tensor(targets, dtype=torch.long),
        weight_N=torch.tensor(weights, dtype=torch.float64),
        slots=(Slice(adapter, 0, len(ids)),),
    )
