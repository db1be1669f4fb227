"""Training on preferences: the objective of each step, and the model as it stood at the start.

The log-probabilities of all answers in the starting model are computed once, before the first step, by the same model
with the same adapter, and stored in RUN/reference.safetensors. So there is no second copy of the base model or of the
adapter, a step costs no second forward pass, and a resumed run reads the very same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.config.toml import Config
from lorasmith.data.dataset.fit import truncate
from lorasmith.data.dataset.plan import Plan
from lorasmith.errors import DataError, RunError
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.evaluation.preference import PreferenceLosses, evaluate_sums, preference_losses
from lorasmith.i18n import _
from lorasmith.model.base import Base
from lorasmith.model.preference import AnswerSums, PreferenceLoss, Share, metrics, objective
from lorasmith.model.row import IGNORED, Example, Objective, Row
from lorasmith.report import Report
from lorasmith.system.writing import writing
from lorasmith.training.distributed import World

REFERENCE_TENSORS = ("train", "train_kl", "held_out", "held_out_kl")


@dataclass(frozen=True)
class Reference:
    """What the starting model says of the answers.

    train: log-probabilities of the answers that are trained on, [K]; held_out: the sums of the held-out ones, as an
    `AnswerSums` stacked, [4, K]. train_kl, held_out_kl: log-probabilities of the unrelated answers of kto, else empty.
    """

    train: Tensor
    train_kl: Tensor
    held_out: Tensor
    held_out_kl: Tensor

    def save(self, path: Path) -> None:
        """Write the file `path`."""
        with writing(path):
            save_file({name: getattr(self, name).contiguous() for name in REFERENCE_TENSORS}, path)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read the file `path`. Raises RunError if that is not possible."""
        try:
            tensors = load_file(path)
            return cls(*(tensors[name] for name in REFERENCE_TENSORS))
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(
                _(
                    "{path}: cannot be read ({error}), but it holds what the model said of the answers before the "
                    "training. Start again with --overwrite.",
                    path=path,
                    error=error,
                )
            ) from None


def loss_of(config: Config) -> PreferenceLoss | None:
    """The loss that `config` asks for; None if it does not train on preferences."""
    method, given = config.training.method, config.preference
    if method == "lora" or method == "full":
        return None
    return PreferenceLoss(
        method,
        given.beta_of(method),
        given.gamma,
        given.label_smoothing,
        given.rpo_alpha,
        given.desirable_weight,
        given.undesirable_weight,
    )


class Preference:
    """What a training on preferences needs besides the examples, for the plan of the training.

    train, held_out: the examples, with the labels that the loss needs. unrelated, held_out_unrelated: with kto, for
    each example its prompt with the answer of another one, to estimate the divergence from the starting model (KTO,
    section 4.1: an answer of the same batch); else empty.
    """

    def __init__(
        self, loss: PreferenceLoss, train: Sequence[Example], held_out: Sequence[Example], max_length: int
    ) -> None:
        """max_length: of an unrelated answer with its prompt, in tokens; what is longer is cut off."""
        self.loss, self.max_length = loss, max_length
        self.train, self.held_out = loss.examples(train), loss.examples(held_out)
        self.unrelated: list[Example] = []
        self.held_out_unrelated = self._unrelated(self.held_out)
        self.reference: Reference | None = None

    @classmethod
    def of(
        cls, config: Config, train: Sequence[Example], held_out: Sequence[Example], max_length: int
    ) -> "Preference | None":
        """What `config` asks for; None if it does not train on preferences. Raises DataError for too few answers."""
        loss = loss_of(config)
        if loss is None:
            return None
        if loss.method == "kto" and len(train) < 2:
            raise DataError(
                _(
                    "data.data: kto needs at least two answers, because it estimates with unrelated ones how far the "
                    "model has moved. Add rows."
                )
            )
        return cls(loss, train, held_out, max_length)

    def follow(self, plan: Plan) -> None:
        """Choose the unrelated answers: that of the example before in its step of the first epoch."""
        if self.loss.method != "kto":
            return
        order = [i for k in range(min(plan.steps_per_epoch, len(plan))) for i in plan.members(k)]
        order += sorted(set(range(len(self.train))) - set(order))  # not trained on in a run of few steps
        step = plan.step_examples
        before = dict[int, int]()
        for place, i in enumerate(order):
            first = place - place % step
            last = min(first + step, len(order)) - 1
            before[i] = order[(place - 1 if place > first else last) if last > first else place - 1]
        self.unrelated = [self._mixed(self.train[i], self.train[before[i]]) for i in range(len(self.train))]

    def _unrelated(self, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with the answer of the example before; good answers first, for the next is to the same prompt."""
        if self.loss.method != "kto":
            return []
        order = sorted(range(len(examples)), key=lambda i: not examples[i].desirable)
        before = {i: order[place - 1] for place, i in enumerate(order)}
        return [self._mixed(example, examples[before[i]]) for i, example in enumerate(examples)]

    def _mixed(self, asked: Example, answered: Example) -> Example:
        """The prompt of `asked` with the answer of `answered`."""
        start, since = asked.learned[0] + 1, answered.learned[0] + 1
        ids = [*asked.ids[:start], *answered.ids[since:]]
        targets = [*[IGNORED] * (start - 1), *answered.targets[since - 1 :]]
        weights = [*[0.0] * (start - 1), *answered.weights[since - 1 :]]
        return truncate(Example(ids, targets, weights, asked.source), self.max_length)

    # -- the starting model -----------------------------------------------------------------------------------------

    def measure(self, base: Base, adapter: str, report: Report, world: World) -> Reference:
        """Let the model say what the reference needs to know, as it is now. All processes share the work."""
        task = _("the model before training")
        empty = torch.zeros(0, dtype=torch.float64)

        def sums(examples: Sequence[Example], unit: int) -> Tensor:
            return torch.stack(evaluate_sums(base, examples, unit, adapter, report, task, world))

        unit, needed = self.loss.unit, self.loss.has_reference
        self.reference = Reference(
            sums(self.train, unit)[0] if needed else empty,
            sums(self.unrelated, 1)[0] if self.unrelated else empty,
            sums(self.held_out, unit) if self.held_out else torch.zeros(4, 0, dtype=torch.float64),
            sums(self.held_out_unrelated, 1)[0] if self.held_out_unrelated else empty,
        )
        return self.reference

    # -- training ---------------------------------------------------------------------------------------------------

    def begin(self, base: Base, adapter: str, units: Sequence[int], world: World) -> "PreferenceStep":
        """The step of these units, on all ranks."""
        examples = [self.train[i] for i in self.members(units)]
        tokens = sum(e.n_targets if self.loss.method == "orpo" else e.weight for e in examples if e.desirable)
        wide = torch.float64 if base.device.type == "cpu" else torch.float32  # as the weights of a row
        share = Share(len(units), tokens, torch.zeros(8, dtype=wide, device=base.device))
        kl = None
        if self.loss.method == "kto":
            losses = evaluate_loss(base, [self.unrelated[i] for i in units], adapter, world=world).losses
            kl = _divergence(-losses, self._of_start("train_kl", len(self.unrelated))[list(units)])
        return PreferenceStep(self, share, kl)

    def members(self, units: Sequence[int]) -> list[int]:
        """The examples of these units."""
        return [i * self.loss.unit + k for i in units for k in range(self.loss.unit)]

    def _of_start(self, name: str, count: int) -> Tensor:
        """A tensor of the reference; zeros in a dry run, which has none."""
        return torch.zeros(count, dtype=torch.float64) if self.reference is None else getattr(self.reference, name)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def losses_before(self) -> PreferenceLosses:
        """The held-out losses of the starting model."""
        assert self.reference is not None
        return self._losses(AnswerSums(*self.reference.held_out), self.reference.held_out_kl)

    def losses(self, base: Base, adapter: str | None, report: Report, task: str, world: World) -> PreferenceLosses:
        """The held-out losses under `adapter`."""
        sums = evaluate_sums(base, self.held_out, self.loss.unit, adapter, report, task, world)
        unrelated = evaluate_sums(base, self.held_out_unrelated, 1, adapter, report, task, world).logp_K
        return self._losses(sums, unrelated)

    def _losses(self, sums: AnswerSums, unrelated_K: Tensor) -> PreferenceLosses:
        assert self.reference is not None
        kl = _divergence(unrelated_K, self.reference.held_out_kl) if len(unrelated_K) else None
        reference_K = self.reference.held_out[0] if self.loss.has_reference else None
        return preference_losses(self.loss, self.held_out, sums, reference_K, kl)


@dataclass(frozen=True)
class PreferenceStep:
    """One step: what its rows minimize. kl: the estimate of the divergence, with kto."""

    preference: Preference
    share: Share
    kl: Tensor | None

    def objective(self, row: Row, units: Sequence[int]) -> Objective:
        """The objective of a row with these units."""
        of, device = self.preference, row.at_N.device
        members, wide = of.members(units), row.weight_N.dtype
        reference_K = None
        if of.loss.has_reference:
            reference_K = of._of_start("train", len(of.train))[members].to(device, wide)
        kl = None if self.kl is None else self.kl.to(device, wide)
        return objective(of.loss, row, reference_K, [of.train[i].desirable for i in members], kl, self.share)

    def metrics(self, world: World) -> dict[str, float]:
        """The metrics of the step on all ranks, under TRL's names, after its rows have been computed."""
        world.all_reduce(self.share.sums_8)
        found = metrics(self.share.sums_8)
        return found if self.kl is None else found | {"kl": float(self.kl)}


def _divergence(now_K: Tensor, start_K: Tensor) -> Tensor:
    """The estimate of KL(model || starting model) from log-probabilities of unrelated answers; never below 0."""
    return (now_K - start_K).mean().clamp(min=0)
