"""Pruning and electing signs, on numbers that can be checked by eye; tests/lora/test_combine.py compares with PEFT."""

import pytest
import torch

from lorasmith.lora.sparsify import Sparsifier, sparsifier

ONE, TWO = torch.tensor([4.0, -2.0, 0.1, 3.0]), torch.tensor([2.0, 3.0, 5.0, -0.1])


def test_without_pruning_it_is_a_weighted_sum():
    assert Sparsifier()([ONE, TWO], [1.0, -2.0]).tolist() == pytest.approx([0.0, -8.0, -9.9, 3.2])


def test_the_largest_values_are_kept():
    assert Sparsifier(density=0.5)([ONE], [1.0]).tolist() == [4.0, 0.0, 0.0, 3.0]
    assert Sparsifier(density=0.1)([ONE], [1.0]).tolist() == [0.0] * 4
    assert Sparsifier(density=1.0)([ONE.view(2, 2)], [2.0]).tolist() == (2 * ONE.double()).view(2, 2).tolist()


def test_ties_averages_the_values_that_have_the_elected_sign():
    """Trim, elect, merge: section 3 of arXiv:2306.01708."""
    assert Sparsifier(density=0.75, elects=True)([ONE, TWO], [1.0, 1.0]).tolist() == [3.0, 3.0, 5.0, 3.0]
    assert Sparsifier(density=0.75, elects=True)([ONE, TWO], [0.5, 1.0]).tolist() == [2.0, 3.0, 5.0, 1.5]


def test_signs_are_elected_by_sum_or_by_number():
    values = [torch.tensor([-5.0]), torch.tensor([1.0]), torch.tensor([2.0])]
    assert Sparsifier(elects=True)(values, [1.0] * 3).tolist() == [-5.0]
    assert Sparsifier(elects=True, by_count=True)(values, [1.0] * 3).tolist() == [1.5]


def test_a_negative_weight_turns_the_sign_before_the_election():
    """PEFT 0.21.2 elects first: it takes 4 and 2 for agreeing, and returns (4 - 2) / 2 = 1."""
    assert Sparsifier(elects=True)([ONE[:1], TWO[:1]], [1.0, -1.0]).tolist() == [4.0]


def test_random_values_are_kept_and_rescaled():
    def drawn(seed: int) -> torch.Tensor:
        rule = Sparsifier(density=0.25, is_random=True, generator=torch.Generator().manual_seed(seed))
        return rule([torch.ones(10_000)], [1.0])

    assert set(drawn(0).tolist()) == {0.0, 4.0}
    assert abs(float(drawn(0).mean()) - 1) < 4 * (3 / 10_000) ** 0.5  # four standard errors
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize(
    ("rule", "is_random", "elects"),
    [
        ("linear", False, False),
        ("magnitude_prune", False, False),
        ("ties", False, True),
        ("dare_linear", True, False),
        ("dare_ties", True, True),
    ],
)
def test_the_rules_by_their_names(rule, is_random, elects):
    found = sparsifier(rule, 0.5, "frequency", None)
    assert (found.is_random, found.elects, found.by_count, found.density) == (is_random, elects, True, 0.5)
    assert not sparsifier(rule, None, "total", None).by_count
    assert sparsifier(rule, None, "total", None).density == 1
