"""Losses on preferences: of which answers are better, from their log-probabilities.

    dpo    -log sigmoid(r_chosen - r_rejected), where r = beta * (log pi - log pi_ref) (Rafailov et al. 2023,
           arXiv:2305.18290, eq. 7; label_smoothing: Mitchell 2023, "A note on DPO with noisy preferences")
    orpo   the mean cross-entropy of the chosen texts, prompt included, - beta * log sigmoid of the difference of the
           log-odds, each of the mean log-probability of a token (Hong et al. 2024, arXiv:2403.07691, eqs. 4, 6, 7)
    kto    1 - sigmoid(r - z) for a desirable answer and 1 - sigmoid(z - r) for another one, times their weights, where
           z = beta * KL (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7)
    simpo  -log sigmoid(r_chosen - r_rejected - gamma), where r = beta * log pi / tokens
           (Meng et al. 2024, arXiv:2405.14734, eq. 6)

Each is TRL's: DPOTrainer (loss_type sigmoid), KTOTrainer, and the experimental ORPOTrainer and CPOTrainer (loss_type
simpo, cpo_alpha rpo_alpha). With rpo_alpha, dpo and simpo add that times the mean cross-entropy of the tokens of the
chosen answers (Pang et al. 2024, arXiv:2404.19733, eq. 1; TRL's loss_type sft).

    K = answers; U = units: pairs, the chosen answer first, or single answers with kto; N = labels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.model.row import Example, Objective, Row

PreferenceMethod = Literal["dpo", "orpo", "kto", "simpo"]
HALF = -0.6931471805599453  # log(1/2): above it, log(1 - exp(x)) is computed with expm1, else with log1p


class AnswerSums(NamedTuple):
    """What the losses need of each answer, [K] each.

    logp: log-probability of the answer. nll: sum of the cross-entropies of all labels, those of weight 0 included.
    tokens: the answer's; labels: all of the example.
    """

    logp_K: Tensor
    nll_K: Tensor
    tokens_K: Tensor
    labels_K: Tensor


class Values(NamedTuple):
    """Of each unit its loss, without the term over tokens, and whether it is right; of each answer its reward, and the
    log-probability that the loss uses: a sum over tokens with a reference, else their mean.

    Right is a pair whose chosen answer has the larger reward, and with kto an answer whose loss is below one half.
    """

    loss_U: Tensor
    right_U: Tensor
    reward_K: Tensor
    logp_K: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """One of the losses with its parameters, which have TRL's names."""

    method: PreferenceMethod
    beta: float = 0.1
    gamma: float = 1.0
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def unit(self) -> int:
        """Answers of a unit."""
        return 1 if self.method == "kto" else 2

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model as it stood at the start."""
        return self.method in ("dpo", "kto")

    @property
    def nll_weight(self) -> float:
        """The factor of the mean cross-entropy of the chosen answers."""
        return 1.0 if self.method == "orpo" else 0.0 if self.method == "kto" else self.rpo_alpha

    def values(self, sums: AnswerSums, reference_K: Tensor | None, desirable_K: Tensor, kl: Tensor | None) -> Values:
        """The values of answers.

        reference_K: their log-probabilities in the model as it stood at the start; None for losses without one.
        desirable_K: 1 for a good answer, 0 for a bad one. kl: the estimate of the divergence that kto needs, a scalar.
        """
        logp_K = sums.logp_K / sums.tokens_K if reference_K is None else sums.logp_K
        reward_K = self.beta * (logp_K if reference_K is None else logp_K - reference_K)
        if self.method == "kto":
            assert kl is not None
            away_K = (2 * desirable_K - 1) * (reward_K - self.beta * kl)
            weight_K = desirable_K * self.desirable_weight + (1 - desirable_K) * self.undesirable_weight
            return Values(weight_K * (1 - torch.sigmoid(away_K)), away_K > 0, reward_K, logp_K)
        chosen_U, rejected_U = reward_K[0::2], reward_K[1::2]
        right_U = chosen_U > rejected_U
        if self.method == "orpo":
            odds_K = logp_K - _log1mexp(logp_K)
            return Values(-self.beta * F.logsigmoid(odds_K[0::2] - odds_K[1::2]), right_U, reward_K, logp_K)
        margin_U = chosen_U - rejected_U - (self.gamma if self.method == "simpo" else 0.0)
        loss_U = -(1 - self.label_smoothing) * F.logsigmoid(margin_U) - self.label_smoothing * F.logsigmoid(-margin_U)
        return Values(loss_U, right_U, reward_K, logp_K)

    def nll(self, sums: AnswerSums) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each unit's chosen text, [U], and the number of its tokens, [U], for `nll_weight`."""
        if self.method == "orpo":
            return sums.nll_K[0::2], sums.labels_K[0::2]
        return -sums.logp_K[:: self.unit], sums.tokens_K[:: self.unit]

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with the labels that the loss needs: with orpo also those of the prompts, of weight 0."""
        if self.method != "orpo":
            return list(examples)
        return [_with_prompt(example) if example.desirable else example for example in examples]


def _with_prompt(example: Example) -> Example:
    """The example with every token but the first as a target; those that were none have weight 0."""
    end = example.useful_length
    targets = [*example.whole_ids[1 : end + 1], *example.targets[end:]]
    learned = set(example.learned)
    weights = [w if i in learned else 0.0 for i, w in enumerate(example.weights)]
    return Example(example.ids, targets, weights, example.source, example.desirable)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, precise for all (Maechler 2012, eq. 7)."""
    return torch.where(x > HALF, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def owners(row: Row) -> Tensor:
    """The example of each label, [N]."""
    listed = [k for k, count in enumerate(row.counts) for _label in range(count)]
    return torch.tensor(listed, dtype=torch.long).to(row.at_N.device)


def answer_sums(losses_N: Tensor, row: Row) -> AnswerSums:
    """The sums over a row's labels by example; the weights of the row must not be divided by anything."""
    owner_N, weight_N = owners(row), row.weight_N.to(losses_N.dtype)
    zeros_K = losses_N.new_zeros(len(row.counts))

    def summed(values_N: Tensor) -> Tensor:
        return zeros_K.index_add(0, owner_N, values_N)

    return AnswerSums(
        -summed(losses_N * weight_N), summed(losses_N), summed(weight_N), summed(torch.ones_like(losses_N))
    )


@dataclass
class Share:
    """What a step's objectives divide by, and what they add up, over its rows on this rank.

    units: of the step; nll_tokens: those of its chosen texts. rewards_8: sums of the rewards and log-probabilities of
    chosen and of rejected answers, the numbers of both, right units, and units.
    """

    units: int
    nll_tokens: float
    sums_8: Tensor


def objective(
    loss: PreferenceLoss, row: Row, reference_K: Tensor | None, desirable: Sequence[bool | None], kl: Tensor | None,
    share: Share,
) -> Objective:  # fmt: skip
    """The part of the step's loss that a row contributes; the parts add up to the mean over all units.

    reference_K, desirable, kl: of the row's answers, as in `PreferenceLoss.values`. share: gets the row's sums.
    """
    wide = row.weight_N.dtype
    desirable_K = torch.tensor([float(bool(one)) for one in desirable], dtype=wide).to(row.at_N.device)

    def of_row(losses_N: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_N = losses_N.detach().to(wide).requires_grad_(True)
            sums = answer_sums(leaf_N, row)
            values = loss.values(sums, reference_K, desirable_K, kl)
            value = values.loss_U.sum() / share.units
            if loss.nll_weight:
                value = value + loss.nll_weight * loss.nll(sums)[0].sum() / share.nll_tokens
            (weight_N,) = torch.autograd.grad(value, leaf_N)
        share.sums_8 += step_sums(values, desirable_K)
        return value.detach(), weight_N

    return of_row


def step_sums(values: Values, desirable_K: Tensor) -> Tensor:
    """The sums that `metrics` divides, [8]; they add up over rows and ranks."""
    rejected_K = 1 - desirable_K
    return torch.stack([
        (values.reward_K * desirable_K).sum(), (values.reward_K * rejected_K).sum(),
        (values.logp_K * desirable_K).sum(), (values.logp_K * rejected_K).sum(),
        desirable_K.sum(), rejected_K.sum(),
        values.right_U.to(desirable_K.dtype).sum(), torch.full_like(rejected_K[0], len(values.right_U)),
    ]).detach()  # fmt: skip


def metrics(sums_8: Tensor) -> dict[str, float]:
    """The metrics of a step under TRL's names; none of answers that the step does not have."""
    chosen, rejected, logp_chosen, logp_rejected, n_chosen, n_rejected, right, units = sums_8.tolist()
    found = {"rewards/accuracies": right / units}
    if n_chosen:
        found |= {"rewards/chosen": chosen / n_chosen, "logps/chosen": logp_chosen / n_chosen}
    if n_rejected:
        found |= {"rewards/rejected": rejected / n_rejected, "logps/rejected": logp_rejected / n_rejected}
    if n_chosen and n_rejected:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
