"""Combining tensors value by value: pruning, and the signs that TIES elects. As in PEFT's `utils/merge_utils.py`.

ties              keep the largest values, elect a sign for each place, average those that have it (arXiv:2306.01708)
dare_*            keep random values and divide them by the density (arXiv:2311.03099)
magnitude_prune   keep the largest values, add them up
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Sparsifier:
    """How tensors of one shape become one.

    density: the share of the values that is kept. is_random: keep random values instead of the largest. elects: average
    the values with the elected sign instead of adding all up. by_count: elect by the number of values instead of their
    sum. generator: for the random values; torch's global one if None.
    """

    density: float = 1.0
    is_random: bool = False
    elects: bool = False
    by_count: bool = False
    generator: Generator | None = None

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combination of `tensors`, all of one shape, in float64."""
        prune: Callable[[Tensor], Tensor] = self._prune_random if self.is_random else self._prune_smallest
        pruned = torch.stack([prune(tensor).double() for tensor in tensors])
        weights_N = pruned.new_tensor(weights).view(-1, *[1] * (pruned.dim() - 1))
        if not self.elects:
            return (pruned * weights_N).sum(0)
        # With a negative weight, the values that agree are those of the opposite sign. PEFT 0.21.2 ignores this.
        agree = self._has_elected_sign(pruned * weights_N.sign())
        return (pruned * weights_N * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _prune_smallest(self, tensor: Tensor) -> Tensor:
        """Keep the largest of the values, by magnitude."""
        if self.density >= 1:
            return tensor
        kept = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        mask = torch.zeros_like(tensor).flatten().index_fill_(0, kept, 1)
        return tensor * mask.view(tensor.shape)

    def _prune_random(self, tensor: Tensor) -> Tensor:
        """Keep each value with the probability `density`, divided by it, which preserves the expectation."""
        if self.density >= 1:
            return tensor
        return tensor * torch.bernoulli(torch.full_like(tensor, self.density), generator=self.generator) / self.density

    def _has_elected_sign(self, tensors: Tensor) -> Tensor:
        """Where the values [N, ...] have the sign that most of them have, or most of their sum."""
        total = (tensors.sign() if self.by_count else tensors).sum(0)
        return tensors.sign() == torch.where(total >= 0, 1, -1)


def sparsifier(rule: str, density: float | None, majority_sign_method: str, generator: Generator | None) -> Sparsifier:
    """The sparsifier of linear, ties, dare_linear, dare_ties or magnitude_prune, the methods without their `_svd`."""
    return Sparsifier(
        density=1.0 if density is None else density,
        is_random=rule.startswith("dare"),
        elects=rule.endswith("ties"),
        by_count=majority_sign_method == "frequency",
        generator=generator,
    )
