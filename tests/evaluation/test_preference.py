"""Held-out preferences: the loss of one step with all of them, accuracy, margin, and their intervals."""

import math

import pytest
import torch

from lorasmith.evaluation.preference import compare_preferences, evaluate_sums, preference_losses
from lorasmith.model.preference import AnswerSums, PreferenceLoss
from lorasmith.model.row import IGNORED, Example
from tests.support.families import WORDS, adapted


def answers(pairs: int = 5) -> list[Example]:
    """Two answers to each of several prompts."""
    made = []
    for i in range(pairs):
        generator = torch.Generator().manual_seed(i)
        prompt = torch.randint(3, WORDS, (9,), generator=generator).tolist()
        for desirable in (True, False):
            ids = prompt + torch.randint(3, WORDS, (2 + i,), generator=generator).tolist()
            targets = [IGNORED] * 8 + ids[9:]
            made.append(Example(ids[:-1], targets, [1.0] * len(targets), f"a:{i}", desirable))
    return made


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_sums_of_each_answer_are_those_of_the_answer_alone(family):
    base, _adapter = adapted(family)
    batch = answers()
    found = evaluate_sums(base, batch, 2, "default")
    for i, one in enumerate(batch):
        alone = evaluate_sums(base, [one], 1, "default")
        assert [float(part[i]) for part in found] == pytest.approx([float(part[0]) for part in alone], rel=1e-6)
    assert found.tokens_K.tolist() == [one.n_targets for one in batch]
    assert float(found.logp_K.sum()) == pytest.approx(-float(found.nll_K.sum()))


def sums_of(logp: list[float]) -> AnswerSums:
    logp_K = torch.tensor(logp, dtype=torch.float64)
    return AnswerSums(logp_K, -logp_K, torch.full_like(logp_K, 2.0), torch.full_like(logp_K, 2.0))


def test_dpo_with_its_own_reference_is_the_logarithm_of_two():
    batch = answers(2)
    sums = sums_of([-1.0, -2.0, -3.0, -4.0])
    found = preference_losses(PreferenceLoss("dpo"), batch, sums, sums.logp_K, None)
    assert found.losses.tolist() == [math.log(2)] * 2
    assert found.scores == {"held_out_accuracy": 0.0, "held_out_margin": 0.0}


def test_accuracy_and_margin_of_pairs():
    batch = answers(2)
    now, start = sums_of([-1.0, -2.0, -3.0, -4.0]), sums_of([-2.0, -1.0, -1.0, -3.0])
    found = preference_losses(PreferenceLoss("dpo", beta=0.5), batch, now, start.logp_K, None)
    assert found.reward_K.tolist() == [0.5, -0.5, -1.0, -0.5]
    assert found.scores == {"held_out_accuracy": 0.5, "held_out_margin": 0.25}


def test_kto_counts_answers_and_weighs_them():
    batch = answers(2)[:3]  # two good ones and a bad one
    now, start = sums_of([-1.0, -2.0, -3.0]), sums_of([-2.0, -1.0, -1.0])
    loss = PreferenceLoss("kto", beta=1.0, undesirable_weight=3.0)
    found = preference_losses(loss, batch, now, start.logp_K, torch.tensor(0.5))
    wanted = [1 - torch.sigmoid(torch.tensor(x, dtype=torch.float64)) for x in (0.5, 1.5, -2.5)]
    assert found.losses.tolist() == pytest.approx([float(wanted[0]), 3 * float(wanted[1]), float(wanted[2])])
    assert found.scores == pytest.approx({"held_out_accuracy": 2 / 3, "held_out_margin": -0.5 + 1.0})


def test_orpo_takes_the_mean_over_all_tokens_of_the_chosen_texts():
    batch = answers(2)
    logp_K = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    sums = AnswerSums(logp_K, -logp_K * 3, torch.full_like(logp_K, 2.0), torch.tensor([4.0, 9.0, 6.0, 9.0]).double())
    loss = PreferenceLoss("orpo", beta=0.1)
    without = preference_losses(PreferenceLoss("orpo", beta=1e-9), batch, sums, None, None)
    assert float(without.losses.mean()) == pytest.approx((3.0 + 9.0) / 10, abs=1e-6)
    assert preference_losses(loss, batch, sums, None, None).loss > without.loss


def test_the_intervals_are_those_of_a_paired_bootstrap():
    batch, generator = answers(30), torch.Generator().manual_seed(0)
    start = sums_of((-torch.rand(60, generator=generator).double() * 9 - 1).tolist())
    moved = start.logp_K + torch.randn(60, generator=generator).double() + torch.tensor([1.0, -1.0] * 30)
    now = start._replace(logp_K=moved)
    loss = PreferenceLoss("dpo", beta=0.3)
    before = preference_losses(loss, batch, start, start.logp_K, None)
    after = preference_losses(loss, batch, now, start.logp_K, None)
    found = compare_preferences(before, after)
    assert found.before == pytest.approx(math.log(2))
    assert found.low < found.difference < found.high < 0
    assert found.is_significant
    assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]
    margins = after.reward_K[0::2] - after.reward_K[1::2]
    spread = 1.96 * float(margins.std()) / math.sqrt(30)
    assert found.margin == pytest.approx(float(margins.mean()))
    assert found.margin_interval == pytest.approx((found.margin - spread, found.margin + spread), abs=spread / 3)
    assert "held-out preference loss 0.6931 -> " in str(found)
    assert "on 30 held-out rows: significantly better. Accuracy " in str(found)
