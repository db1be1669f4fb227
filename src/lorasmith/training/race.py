"""The learning-rate race: several rates are trained at once for a few steps, and the best by held-out loss wins.

Each rate has a copy of the new adapter, which starts, sees and counts the examples of the plan's first steps as the run
itself will. The copies are discarded: the run then begins as if its rate had been given.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lorasmith.config.training import USUAL_RATE, usual_rate
from lorasmith.errors import ConfigError, TrainingError
from lorasmith.evaluation.loss import evaluate_loss
from lorasmith.i18n import _
from lorasmith.lora.inject import inject, remove
from lorasmith.lora.quantized import count_parameters
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.report import Report
from lorasmith.training.loop import Job, steps_at_once
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import in_groups, make_optimizer

TIMES = (0.1, 0.32, 1, 3.2, 10)  # the usual rate: evenly spaced over two decades
# Of the whole training: what all steps and what all evaluations of the race may cost if being computed at once gains
# nothing. Together with what is not counted, such as adding the adapters, a run takes at most 1.3 times as long.
STEPS_SHARE, EVALUATION_SHARE = 0.2, 0.05
FEWEST_STEPS, MOST_STEPS, MOST_EXAMPLES = 3, 100, 100
FORWARD = 1 / 3  # of the time of a training step
WARMUP = 0.3  # of the race's steps


@dataclass(frozen=True)
class Race:
    """The rate that won, and why, for config.toml."""

    rate: float
    why: str


def race(job: Job, report: Report) -> Race:
    """Find the learning rate of a run that has not begun. The same seed gives the same one; the job is left unchanged.

    A run that is too short for a race gets the usual rate, and `report` says so.

    Raises:
        ConfigError: the adapter cannot be copied.
        TrainingError: no rate gave a finite loss.
    """
    _require_copies(job)
    usual = usual_rate(count_parameters(job.base.model) - job.parameters.values.numel())
    rates, steps = [float(f"{times * usual:.2g}") for times in TIMES], _affordable_steps(job)
    if steps < FEWEST_STEPS:
        why = _(
            "the usual value; the run has too few steps ({steps}) for a race of learning rates", steps=len(job.plan)
        )
        report.say(_("Learning rate {rate:g}: {why}", rate=usual, why=why))
        return Race(usual, why)
    examples, kind = _examples(job, steps)
    report.say(
        _(
            "Race of {rates} learning rates over {steps} steps, at once; then the loss on {examples} {kind}",
            rates=len(rates), steps=steps, examples=len(examples), kind=kind,
        )
    )  # fmt: skip
    with _racers(job, rates, steps) as racers:
        torch.manual_seed(job.config.seed)  # dropout
        for k in range(steps):
            steps_at_once([(racer, k) for racer in racers])
            report.progress(_("race of learning rates"), k + 1, steps)
        losses = [evaluate_loss(job.base, examples, racer.adapter).loss for racer in racers]
    found = sorted((loss, rate) for loss, rate in zip(losses, rates, strict=True) if math.isfinite(loss))
    if not found:
        raise TrainingError(_("training.learning_rate: no rate of the race gave a finite loss. Set one yourself."))
    for loss, rate in zip(losses, rates, strict=True):
        report.say(f"  {rate:<9g} {loss:.4f}" + ("  <-" if rate == found[0][1] else ""))
    table = ", ".join(f"{rate:g}: {loss:.4f}" for loss, rate in zip(losses, rates, strict=True))
    why = _("the best of a race over {steps} steps; loss on {examples} {kind}: {table}", steps=steps,
            examples=len(examples), kind=kind, table=table)  # fmt: skip
    return Race(found[0][1], why)


def _require_copies(job: Job) -> None:
    adapter = job.base.adapters[job.adapter]
    options = {
        f"training.method {job.config.method!r}": job.config.method != "lora",
        "lora.bias": adapter.config.bias != "none",
        "lora.modules_to_save": bool(adapter.config.modules_to_save),
        "data.add_tokens": bool(job.base.added_tokens),
        "training.start_from": job.config.start_from is not None,
        "torchrun": job.world.size > 1,
    }
    problems = [
        _("training.learning_rate: auto is not possible with {option}. Set a number, such as {rate:g}.", option=option,
          rate=USUAL_RATE)
        for option, is_set in options.items() if is_set
    ]  # fmt: skip
    if problems:
        raise ConfigError(*problems)


def _affordable_steps(job: Job) -> int:
    """The number of the plan's first steps that all rates together can take."""
    lengths = job.plan.lengths
    left, steps = STEPS_SHARE * job.plan.total(lengths) / len(TIMES), 0
    for k in range(min(len(job.plan), MOST_STEPS)):
        left -= sum(lengths[i] for i in job.plan.members(k))
        if left < 0:
            break
        steps = k + 1
    return steps


def _examples(job: Job, steps: int) -> tuple[Sequence[Example], str]:
    """The examples that decide, and what they are: held-out ones, or else those that the race does not train on."""
    candidates, kind = job.held_out, _("held-out examples")
    if not candidates:
        seen = {i for k in range(steps) for i in job.plan.members(k)}
        candidates, kind = [e for i, e in enumerate(job.train) if i not in seen], _("examples that it did not train on")
    if not candidates:
        candidates, kind = job.train, _("training examples")
    left = EVALUATION_SHARE * job.plan.total(job.plan.lengths) / len(TIMES) / FORWARD
    chosen: list[Example] = []
    for example in candidates[:MOST_EXAMPLES]:
        left -= example.useful_length
        if left < 0 and chosen:
            break
        chosen.append(example)
    return chosen, kind


@contextmanager
def _racers(job: Job, rates: Sequence[float], steps: int) -> Iterator[list[Job]]:
    """A job for each rate, with a copy of the adapter that exists inside the block only."""
    base, names = job.base, [f"race-{i}" for i in range(len(rates))]
    try:
        yield [_racer(job, name, rate, steps) for name, rate in zip(names, rates, strict=True)]
    finally:
        for name in names:
            if base.adapters.pop(name, None) is not None:
                remove(base.model, name)
        base.router.active = job.adapter
        base.router.route(None)


def _racer(job: Job, name: str, rate: float, steps: int) -> Job:
    changes = {"learning_rate": rate, "schedule": "constant", "min_learning_rate": 0.0, "warmup": WARMUP}
    config = job.config.model_copy(update=changes)
    trained = _copy(job.base, job.adapter, name)
    parameters = FlatParameters(in_groups(trained, config))
    plan = replace(job.plan, steps=steps)
    return replace(job, adapter=name, parameters=parameters, optimizer=make_optimizer(parameters, config), plan=plan,
                   config=config)  # fmt: skip


@torch.no_grad()
def _copy(base: Base, adapter: str, name: str) -> dict[str, torch.nn.Parameter]:
    """Add a copy of `adapter` to the model; its trained parameters."""
    own = base.adapters[adapter]
    made = inject(base.model, own.config, base.router, name, seed=0, start=False, any_rank=True)
    for key, parameter in made.parameters.items():
        parameter.copy_(own.parameters[key])
    base.adapters[name] = made
    return made.trained
