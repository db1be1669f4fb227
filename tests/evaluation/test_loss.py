"""Held-out losses against transformers' own, and the paired interval against a count by hand."""

import pytest
import torch

from lorasmith.evaluation.loss import Comparison, ExampleLosses, compare, evaluate_loss
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from tests.support.families import adapted, example, own_logits, tiny_base


def plain(length: int, seed: int) -> Example:
    """Every token learned, with weight one."""
    ids = example(length, seed).ids
    return Example(ids, [*ids[1:], -100], [1.0] * length, "plain")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("adapter", [None, "default"])
@pytest.mark.usefixtures("exact")
def test_losses_are_those_of_transformers_example_by_example(family, adapter):
    base, _adapter = adapted(family)
    own = base if adapter else tiny_base(family)
    examples = [plain(5, 1), plain(12, 2), plain(8, 3)]
    measured = evaluate_loss(base, examples, adapter)
    for e, loss, weight in zip(examples, measured.losses, measured.weights, strict=True):
        wanted = transformers_loss(own, e)
        assert float(loss / weight) == pytest.approx(wanted, rel=1e-10)
        assert weight == len(e.ids) - 1
    assert measured.loss == pytest.approx(float(measured.losses.sum()) / (4 + 11 + 7))


def test_a_loss_of_a_training_that_diverged_has_words():
    """Its perplexity is more than a float can hold."""
    before, after = (ExampleLosses(torch.tensor([loss], dtype=torch.float64), torch.ones(1)) for loss in (2.0, 1e4))
    assert "(perplexity 7.4 -> inf)" in str(compare(before, after))


def transformers_loss(base: Base, e: Example) -> float:
    with torch.no_grad():
        logits = own_logits(base, torch.tensor([e.ids]))
    return float(base.model.loss_function(logits, torch.tensor([e.ids]), vocab_size=logits.shape[-1]))


def test_weights_and_unlearned_tokens_count_as_they_say():
    base = tiny_base("llama")
    e = example(9, 3)
    measured = evaluate_loss(base, [e], None)
    logits = own_logits(base, torch.tensor([e.ids]))[0].detach()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(e.targets), reduction="none")
    weights = torch.tensor([w if t != -100 else 0.0 for w, t in zip(e.weights, e.targets, strict=True)]).double()
    assert float(measured.losses[0]) == pytest.approx(float((losses * weights).sum()), rel=1e-6)
    assert float(measured.weights[0]) == pytest.approx(float(weights.sum()))


def test_measuring_uses_no_dropout_and_leaves_no_trace():
    base, _adapter = adapted("llama", lora_dropout=0.5)
    examples = [plain(9, 1), plain(4, 2)]
    first, second = evaluate_loss(base, examples, "default"), evaluate_loss(base, examples, "default")
    assert torch.equal(first.losses, second.losses)
    assert base.model.training
    assert all(p.grad is None for p in base.model.parameters())


def pair(losses: list[float], weights: list[float]) -> ExampleLosses:
    return ExampleLosses(torch.tensor(losses, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))


def test_the_interval_of_two_examples_is_what_a_hand_counts():
    """Draws of two: both the first (1/4), both the second (1/4), one each (1/2): the 95% are all three."""
    found = compare(pair([4.0, 4.0], [2, 2]), pair([2.0, 5.0], [2, 2]))
    assert (found.before, found.after) == (2.0, 1.75)
    assert found.difference == pytest.approx(-0.25)
    assert (found.low, found.high) == (pytest.approx(-1.0), pytest.approx(0.5))
    assert not found.is_significant
    assert str(found).endswith("on 2 held-out examples: too few examples to tell; hold out more with --held-out")


def test_an_example_counts_by_its_tokens():
    """Three tokens a tenth better, one token much worse: weighed, the mean hardly moves."""
    found = compare(pair([6.0, 1.0], [3, 1]), pair([5.7, 1.3], [3, 1]))
    assert found.difference == pytest.approx(0.0)
    assert (found.low, found.high) == (pytest.approx(-0.1), pytest.approx(0.3))


def test_the_interval_is_that_of_a_bootstrap_written_plainly():
    generator = torch.Generator().manual_seed(5)
    before = torch.rand(20, generator=generator).double() * 10
    after = before - torch.rand(20, generator=generator).double()
    weights = torch.randint(1, 9, (20,), generator=generator).double()
    found = compare(ExampleLosses(before, weights), ExampleLosses(after, weights))
    means = []
    for _draw in range(4000):
        chosen = torch.randint(20, (20,), generator=generator).tolist()
        means.append(sum(float(after[i] - before[i]) for i in chosen) / sum(float(weights[i]) for i in chosen))
    means.sort()
    width = means[3900] - means[100]
    assert found.low == pytest.approx(means[100], abs=0.15 * width)
    assert found.high == pytest.approx(means[3899], abs=0.15 * width)
    assert found.is_significant
    assert found == compare(ExampleLosses(before, weights), ExampleLosses(after, weights))


def test_equal_losses_are_no_difference():
    same = pair([3.0, 1.0, 2.0], [1, 2, 3])
    found = compare(same, same)
    assert (found.difference, found.low, found.high, found.is_significant) == (0, 0, 0, False)


def test_the_interval_is_of_the_difference_not_of_the_losses():
    """Examples far apart, each better by the same: unpaired it would be lost in their spread."""
    losses = [float(i) for i in range(40)]
    found = compare(pair(losses, [1] * 40), pair([x - 0.01 for x in losses], [1] * 40))
    assert found.is_significant
    assert (found.low, found.high) == (pytest.approx(-0.01), pytest.approx(-0.01))


def test_worse_is_real_too():
    worse = Comparison(1.0, 2.0, 0.5, 1.5, 10)
    assert worse.is_significant
    assert "significantly WORSE than the base model" in str(worse)
    assert str(Comparison(2.0, 1.0, -1.5, -0.5, 10)).endswith("significantly better")
    open_end = Comparison(1.0, 2.0, -0.5, 1.5, 10)
    assert not open_end.is_significant
    assert str(open_end).endswith("no significant difference")


def test_an_interval_over_few_examples_is_not_believed():
    assert not Comparison(1.0, 2.0, 0.5, 1.5, 9).is_significant
