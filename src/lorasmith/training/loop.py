"""The training loop: steps, evaluations, checkpoints and metrics, from a plan known whole beforehand."""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasmith.config.training import TrainingConfig
from lorasmith.data.dataset.plan import Plan
from lorasmith.errors import ConfigError, Interrupted, TrainingError
from lorasmith.i18n import _, listed
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.row import Example, Row, Step, flatten
from lorasmith.report import Report
from lorasmith.system.memory import peak_memory_mib
from lorasmith.training import checkpoint
from lorasmith.training.checkpoint import Origin, State
from lorasmith.training.distributed import World
from lorasmith.training.evaluator import Evaluator
from lorasmith.training.files import CHECKPOINTS
from lorasmith.training.history import History
from lorasmith.training.interrupt import deferred
from lorasmith.training.optim import FlatParameters, learning_rate
from lorasmith.training.step import Log, train_step


@dataclass(frozen=True)
class Job:
    """All that a training needs. `folder` gets the metrics and checkpoints/; `write_adapter` fills a folder."""

    base: Base
    adapter: str
    parameters: FlatParameters
    optimizer: torch.optim.Optimizer
    plan: Plan
    train: Sequence[Example]
    config: TrainingConfig
    world: World
    folder: Path
    history: History
    evaluator: Evaluator
    origin: Origin
    write_adapter: Callable[[Path], None]
    report: Report

    @property
    def held_out(self) -> Sequence[Example]:
        """The examples that are only evaluated; there may be none."""
        return self.evaluator.examples

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder / CHECKPOINTS


def train(job: Job, state: State) -> None:
    """Run the steps that `state` has not done yet; `state` moves on, one step at a time.

    It stops before the last one where training.patience runs out, with a checkpoint.

    Raises:
        TrainingError: the loss is no longer finite. The optimiser did not move; the last good state is saved.
        Interrupted: Ctrl-C came; the state is saved.
    """

    def answer() -> None:
        job.report.warn(_("stopping after the current step has been saved; press Ctrl-C again to quit immediately"))

    left = job.plan.total([len(example.ids) for example in job.train], state.step)
    with deferred(answer) as wish:
        while state.step < len(job.plan):
            # before the next step, not behind the last one: a run that stopped in between then measures too
            if state.step and due(job.config.eval_every, state.step):
                _evaluate_or_save(job, state)
                if patience_is_over(job, state):
                    _stop_early(job, state)
                    return
            started = time.perf_counter()
            log = one_step(job, state.step, wish.came)
            if not log.is_finite():
                _stop_unfinite(job, state, log)
            left -= _tokens(job, state.step)
            _advance(job, state, log, time.perf_counter() - started, left)
            if bool(log.stop) and state.step < len(job.plan):
                raise Interrupted(
                    _("Stopped after step {step}; saved in {folder}", step=state.step, folder=save(job, state))
                )
            if save_is_due(job, state.step):
                save(job, state)


def one_step(job: Job, k: int, stop: bool = False) -> Log:
    """Step k of the plan on this rank. Its dropout follows from seed, step and rank, so that resume is a number."""
    torch.manual_seed(((job.config.seed * 1_000_003 + k) * 1_009 + job.world.rank) % 2**63)
    optimizer, total = job.optimizer, sum(job.train[i].weight for i in job.plan.members(k))
    optimizer.param_groups[0]["lr"] = learning_rate(job.config, len(job.plan), k)
    rows = tuple(
        row_of(job.base, [job.train[i] for i in members], total, job.adapter)
        for members in job.plan.of_rank(k, job.world.rank, job.world.size)
    )
    step = Step(rows, job.plan.targets(k))
    return train_step(job.base, job.parameters, optimizer, step, job.config.clip, job.world, stop)


def heaviest_row(job: Job) -> Row:
    """The row of this rank's whole training that holds most tokens."""
    world = job.world
    steps = range(min(len(job.plan), job.plan.steps_per_epoch))
    rows = [row for k in steps for row in job.plan.of_rank(k, world.rank, world.size)]
    longest = heapq.nlargest(8, rows, key=lambda row: sum(job.plan.lengths[i] for i in row))
    laid = [row_of(job.base, [job.train[i] for i in row], 1.0, job.adapter) for row in longest]
    return max(laid, key=lambda row: row.tokens, default=flatten([], 1.0))


def _evaluate_or_save(job: Job, state: State) -> None:
    """Evaluate the adapter; if a custom metric fails, the training is saved first, so that nothing is lost."""
    try:
        job.evaluator.evaluate(state)
    except ConfigError as error:
        folder = _write(job, state)  # the first process alone judges, and the others end with it: nobody is waited for
        where = _(
            "Training progress is saved in {folder}; fix the problem, then continue with --resume.", folder=folder
        )
        raise ConfigError(*error.problems, where) from error


def patience_is_over(job: Job, state: State) -> bool:
    """Whether training.patience evaluations have passed since the best one; told by their steps alone."""
    config, best = job.config, state.best_step
    return bool(config.patience) and best is not None and state.step - best >= config.patience * config.eval_every


def save(job: Job, state: State) -> Path:
    """A checkpoint of the state as it is."""
    folder = _write(job, state) if job.world.is_first else job.checkpoints
    job.world.wait()
    return folder


def _write(job: Job, state: State) -> Path:
    job.history.sync()  # what a resumed run does not do again
    return checkpoint.save(job.checkpoints, state, job.parameters, job.optimizer, job.origin, job.write_adapter)


def save_is_due(job: Job, step: int) -> bool:
    """Whether a checkpoint belongs after `step` steps: every N, at the end of an epoch, and at the end."""
    if step == len(job.plan):
        return True
    every = job.config.save_every
    return step % job.plan.steps_per_epoch == 0 if every == "epoch" else due(every, step)


def due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps happens after `step` of them; 0: never."""
    return bool(every) and step % every == 0


def _tokens(job: Job, k: int) -> int:
    """Tokens of step k's examples, those after the last learned one counted too."""
    return sum(len(job.train[i].ids) for i in job.plan.members(k))


def _advance(job: Job, state: State, log: Log, seconds: float, tokens_left: int) -> None:
    k, loss, tokens = state.step, float(log.loss), _tokens(job, state.step)
    state.step, state.tokens, state.seconds = k + 1, state.tokens + tokens, state.seconds + seconds
    rate = state.tokens / state.seconds
    memory = peak_memory_mib(job.base.device)
    if job.world.is_first and (due(job.config.log_every, state.step) or state.step == len(job.plan)):
        job.history.append({
            "step": state.step, "epoch": job.plan.epoch(k), "loss": loss, "grad_norm": float(log.grad_norm),
            "learning_rate": job.optimizer.param_groups[0]["lr"], "tokens": state.tokens,
            "targets": job.plan.targets(k), "tokens_per_second": tokens / seconds, "seconds": state.seconds,
            "peak_memory_mib": memory,
        })  # fmt: skip
    job.report.progress(
        _("training"), state.step, len(job.plan),
        loss=loss, tokens_per_second=rate, seconds_left=tokens_left / rate, memory_mib=memory,
    )  # fmt: skip


def _stop_early(job: Job, state: State) -> None:
    """Say why, and save: a run that is killed while it is finished then stops here again."""
    save(job, state)
    job.report.say(
        _(
            "Stopped early after step {step} of {steps}: the held-out loss has not improved on {loss:.4f} "
            "since step {best} (training.patience {patience})",
            step=state.step,
            steps=len(job.plan),
            best=state.best_step,
            loss=state.best_loss,
            patience=job.config.patience,
        )
    )


def _stop_unfinite(job: Job, state: State, log: Log) -> None:
    """Say which step and rows, keep the last good state, and stop."""
    sources = sorted(job.train[i].source for i in job.plan.members(state.step))
    where = save(job, state) if state.step else None
    kept = (
        _("the state before this step is saved in {folder}", folder=where)
        if where
        else _("no earlier step was completed")
    )
    raise TrainingError(
        _(
            "step {step}: loss {loss}, gradient norm {norm}: not finite, so the optimiser step was skipped; "
            "{kept}. Rows in this step: {rows}. Lowering training.learning_rate or setting model.dtype to "
            "float32 usually fixes this.",
            step=state.step + 1,
            loss=float(log.loss),
            norm=float(log.grad_norm),
            kept=kept,
            rows=listed([*sources[:8], *(["..."] if len(sources) > 8 else [])]),
        )
    )
