"""The training loop: steps, evaluations, checkpoints and metrics, following a plan that is complete beforehand."""

import heapq
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasmith.config.training import Every, TrainingConfig
from lorasmith.data.dataset.plan import Plan
from lorasmith.errors import ConfigError, Interrupted, LorasmithError, TrainingError
from lorasmith.i18n import _, listed
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.row import Example, Objective, Row, Step, flatten
from lorasmith.report import Report
from lorasmith.system.memory import peak_memory_mib
from lorasmith.training import checkpoint
from lorasmith.training.artifact import Artifact
from lorasmith.training.checkpoint import Origin, State
from lorasmith.training.distributed import World
from lorasmith.training.evaluator import Evaluator
from lorasmith.training.history import History
from lorasmith.training.interrupt import stop_on_signal
from lorasmith.training.optim import FlatParameters, learning_rate
from lorasmith.training.optimizers import Optimizer
from lorasmith.training.preference import Preference
from lorasmith.training.run_files import CHECKPOINTS
from lorasmith.training.step import Learner, Log, train_step, train_step_together

AT_ONCE = 512  # tokens of several adapters in one pass; more gain nothing and need memory (docs/decisions.md)

SHOWN = ("rewards/accuracies", "rewards/margins")  # metrics of preferences in the line of progress

VALUES_SAVED = 3  # the values and two moments, of the same size


@dataclass(frozen=True)
class Job:
    """Everything that a training needs. `folder` is the run's.

    preference: what a training on preferences needs. Then the plan's examples are its units, of one or two answers.
    """

    base: Base
    adapter: str
    parameters: FlatParameters
    optimizer: Optimizer
    plan: Plan
    train: Sequence[Example]
    config: TrainingConfig
    world: World
    folder: Path
    history: History
    evaluator: Evaluator
    origin: Origin
    artifact: Artifact
    report: Report
    preference: Preference | None = None

    def examples(self, units: Sequence[int]) -> list[Example]:
        """The examples that the plan calls `units`."""
        return [self.train[i] for i in (self.preference.members(units) if self.preference else units)]

    def row(self, units: Sequence[int], total_weight: float) -> Row:
        """A row with the examples that the plan calls `units`."""
        total = 1.0 if self.preference else total_weight  # whose objectives divide by themselves
        return row_of(self.base, self.examples(units), total, self.adapter)

    @property
    def held_out(self) -> Sequence[Example]:
        """The examples that are only evaluated on; may be empty."""
        return self.evaluator.examples

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS


def train(job: Job, state: State) -> None:
    """Run the remaining steps of the plan, updating `state` after each.

    If training.patience runs out, saves a checkpoint and returns before the last step.

    Raises:
        TrainingError: the loss or gradient is no longer finite. The optimizer has not moved, and the last good state
            is saved.
        Interrupted: the user pressed Ctrl-C; the state is saved.
    """
    (error,) = train_together([(job, state)])
    if error is not None:
        raise error


def train_together(trainings: Sequence[tuple[Job, State]]) -> list[LorasmithError | None]:
    """`train` of each, over one base model, with a step of all jobs at once; the error that ended each, or None.

    A job that ends or fails leaves the others to go on. Raises Interrupted after saving all of them.
    """
    runs = [_Run(job, state, len(trainings) == 1) for job, state in trainings]

    def announce() -> None:
        text = _("stopping after the current step has been saved; press Ctrl-C again to quit immediately")
        runs[0].job.report.warn(text)

    with stop_on_signal(announce) as stop_request:
        while going := [run for run in runs if run.goes_on()]:
            started = time.perf_counter()
            logs = _steps(going, stop_request.is_set)
            seconds = time.perf_counter() - started
            advanced = [run for run, log in zip(going, logs, strict=True) if run.advance(log, seconds)]
            if any(bool(log.stop) for log in logs):
                _interrupt(advanced)
            for run in advanced:
                run.save_if_due()
    return [run.error for run in runs]


class _Run:
    """A job in the loop: its progress, and the error that ended it."""

    def __init__(self, job: Job, state: State, is_alone: bool) -> None:
        self.job, self.state, self.is_alone = job, state, is_alone
        self.error: LorasmithError | None = None
        self._stopped = False
        sizes = [sum(len(example.ids) for example in job.examples([i])) for i in range(len(job.plan.lengths))]
        self._tokens_left = job.plan.total(sizes, state.step)

    def goes_on(self) -> bool:
        """Whether the job has another step; evaluates the adapter if that is due before it."""
        job, state = self.job, self.state
        if self._is_over or state.step >= len(job.plan):
            return False
        # evaluate before the next step rather than after the last one, so that a resumed run does not skip it
        with self._ended_by_error():
            if state.step and is_due(job.config.eval_every, state.step, job.plan):
                _evaluate_or_save(job, state)
                if patience_is_over(job, state):
                    self._stopped = True
                    _stop_early(job, state)
        return not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._stopped or self.error is not None

    def advance(self, log: Log, seconds: float) -> bool:
        """Count and record a step that took `seconds`; False if it failed."""
        with self._ended_by_error():
            if not log.is_finite():
                _stop_non_finite(self.job, self.state, log)
            self._tokens_left -= _tokens(self.job, self.state.step)
            _advance(self.job, self.state, log, seconds, self._tokens_left)
        return self.error is None

    def save_if_due(self) -> None:
        """Save a checkpoint, as training.save_every says."""
        with self._ended_by_error():
            if save_is_due(self.job, self.state.step):
                save(self.job, self.state)

    @contextmanager
    def _ended_by_error(self) -> Iterator[None]:
        try:
            yield
        except LorasmithError as error:
            self.error = error
            if not self.is_alone:  # the caller reports it only after the others have ended
                self.job.report.warn(str(error))


def _interrupt(runs: Sequence[_Run]) -> None:
    """Save these runs and raise Interrupted, unless this step was the last of all."""
    left = [run for run in runs if run.state.step < len(run.job.plan)]
    if not left:
        return
    folders = [str(save(run.job, run.state)) for run in runs]
    step = left[0].state.step
    raise Interrupted(_("Stopped after step {step}; saved in {folder}", step=step, folder=listed(folders)))


def _steps(runs: Sequence[_Run], stop: bool) -> list[Log]:
    """The next step of each of these runs. One without a finite loss is repeated alone, to see whose fault it is."""
    if len(runs) == 1:
        return [one_step(runs[0].job, runs[0].state.step, stop)]
    logs = steps_at_once([(run.job, run.state.step) for run in runs], stop)
    return [
        log if log.is_finite() else one_step(run.job, run.state.step, stop) for run, log in zip(runs, logs, strict=True)
    ]


def steps_at_once(steps: Sequence[tuple[Job, int]], stop: bool = False) -> list[Log]:
    """Run a step of the plan of each job, over one base model, in passes of several jobs."""
    jobs = [job for job, _k in steps]
    learners = [Learner(job.parameters, job.optimizer, _prepared(job, k), job.config.clip) for job, k in steps]
    row_tokens = min(AT_ONCE, max(job.config.row_tokens for job in jobs))
    return train_step_together(jobs[0].base, learners, row_tokens, jobs[0].world, stop)


def one_step(job: Job, k: int, stop: bool = False) -> Log:
    """Run step k of the plan on this rank; with `stop`, ask all ranks to stop after it.

    Dropout is seeded by the run's seed, the step and the rank, so no generator state is needed to resume.
    """
    torch.manual_seed(((job.config.seed * 1_000_003 + k) * 1_009 + job.world.rank) % 2**63)
    step, objectives, units = _prepared(job, k), tuple[Objective, ...](), job.plan.members(k)
    preferences = job.preference.begin(job.base, job.adapter, units, job.world) if job.preference else None
    if preferences:
        mine = job.plan.of_rank(k, job.world.rank, job.world.size)
        objectives = tuple(preferences.objective(row, members) for row, members in zip(step.rows, mine, strict=True))
    step = replace(step, objectives=objectives)
    log = train_step(job.base, job.parameters, job.optimizer, step, job.config.clip, job.world, stop)
    return replace(log, metrics=preferences.metrics(job.world)) if preferences else log


def _prepared(job: Job, k: int) -> Step:
    """The rows of step k on this rank; sets the optimizer's learning rate for it."""
    total = sum(example.weight for example in job.examples(job.plan.members(k)))
    job.optimizer.lr = learning_rate(job.config, len(job.plan), k)
    mine = job.plan.of_rank(k, job.world.rank, job.world.size)
    return Step(tuple(job.row(members, total) for members in mine), job.plan.targets(k))


def heaviest_row(job: Job) -> Row:
    """The row with the most tokens that this rank will train on."""
    world = job.world
    steps = range(min(len(job.plan), job.plan.steps_per_epoch))
    rows = [row for k in steps for row in job.plan.of_rank(k, world.rank, world.size)]
    longest = heapq.nlargest(8, rows, key=lambda row: sum(job.plan.lengths[i] for i in row))
    built = [job.row(units, 1.0) for units in longest]
    return max(built, key=lambda row: row.tokens, default=flatten([], 1.0))


def _evaluate_or_save(job: Job, state: State) -> None:
    """Evaluate the adapter; if a custom metric fails, the training is saved first, so that nothing is lost."""
    try:
        job.evaluator.evaluate(state)
    except ConfigError as error:
        folder = _write(
            job, state
        )  # without a barrier: only the first process runs metrics, and torchrun ends the others
        where = _(
            "Training progress is saved in {folder}; fix the problem, then continue with --resume.", folder=folder
        )
        raise ConfigError(*error.problems, where) from error


def patience_is_over(job: Job, state: State) -> bool:
    """Whether the last training.patience evaluations brought no better held-out loss."""
    patience, best = job.config.patience, state.best_step
    every = steps_between(job.config.eval_every, job.plan)
    return bool(patience) and best is not None and state.step - best >= patience * every


def save(job: Job, state: State) -> Path:
    """Save a checkpoint of the current state and return its folder."""
    folder = _write(job, state) if job.world.is_first else job.checkpoints
    job.world.barrier()
    return folder


def _write(job: Job, state: State) -> Path:
    job.history.sync()  # a resumed run does not write these lines again
    folder = checkpoint.save(job.checkpoints, state, job.parameters, job.optimizer, job.origin, job.artifact)
    checkpoint.drop_old(job.checkpoints, state, job.config.keep_checkpoints)
    return folder


def save_is_due(job: Job, step: int) -> bool:
    """Whether to save after `step` steps, as training.save_every says; always after the last one."""
    return step == len(job.plan) or is_due(job.config.save_every, step, job.plan)


def steps_between(every: Every, plan: Plan) -> int:
    """The number of steps from one evaluation or checkpoint to the next; 0: there are none during training."""
    return plan.steps_per_epoch if every == "epoch" else every


def is_due(every: Every, step: int, plan: Plan) -> bool:
    """Whether something that happens every `every` steps, or once per epoch, happens after `step` steps."""
    steps = steps_between(every, plan)
    return bool(steps) and step % steps == 0


def kept_checkpoints(job: Job) -> int:
    """The largest number of checkpoints that lie in the run folder at the same time."""
    every = steps_between(job.config.save_every, job.plan)
    saves = 1 + ((len(job.plan) - 1) // every if every else 0)
    return min(job.config.keep_checkpoints or saves, saves)


def disk_bytes(job: Job) -> int:
    """The most that the weights and checkpoints of the run take on the disk, in bytes.

    Each checkpoint has the values with at most two moments, and refers to the best weights so far. One checkpoint more
    is there while it is written.
    """
    saved = (1 + job.artifact.in_checkpoints) * job.artifact.bytes + VALUES_SAVED * job.parameters.values.nbytes
    return job.artifact.bytes + (kept_checkpoints(job) + 1) * saved


def _tokens(job: Job, k: int) -> int:
    """The number of tokens of step k's examples, including those after the last trained token."""
    return sum(len(example.ids) for example in job.examples(job.plan.members(k)))


def _advance(job: Job, state: State, log: Log, seconds: float, tokens_left: int) -> None:
    k, loss, tokens = state.step, float(log.loss), _tokens(job, state.step)
    state.step, state.tokens, state.seconds = k + 1, state.tokens + tokens, state.seconds + seconds
    rate = state.tokens / state.seconds
    memory = peak_memory_mib(job.base.device)
    if job.world.is_first and (is_due(job.config.log_every, state.step, job.plan) or state.step == len(job.plan)):
        job.history.append({
            "step": state.step, "epoch": job.plan.epoch(k), "loss": loss, "grad_norm": float(log.grad_norm),
            "learning_rate": job.optimizer.lr, "tokens": state.tokens,
            "targets": job.plan.targets(k), "tokens_per_second": tokens / seconds, "seconds": state.seconds,
            "peak_memory_mib": memory, **log.metrics,
        })  # fmt: skip
    job.report.progress(
        _("training"), state.step, len(job.plan),
        loss=loss, **{name: log.metrics[name] for name in SHOWN if name in log.metrics},
        tokens_per_second=rate, seconds_left=tokens_left / rate, memory_mib=memory,
    )  # fmt: skip


def _stop_early(job: Job, state: State) -> None:
    """Save and report why. With the checkpoint, a run that is killed before its summary stops here again."""
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


def _stop_non_finite(job: Job, state: State, log: Log) -> None:
    """Save the last good state, and raise TrainingError that names the step and its rows."""
    sources = sorted({example.source for example in job.examples(job.plan.members(state.step))})
    where = save(job, state) if state.step else None
    kept = (
        _("the state before this step is saved in {folder}", folder=where)
        if where
        else _("no earlier step was completed")
    )
    raise TrainingError(
        _(
            "step {step}: loss {loss}, gradient norm {norm}: not finite, so the optimizer step was skipped; "
            "{kept}. Rows in this step: {rows}. Lowering training.learning_rate or setting model.dtype to "
            "float32 usually fixes this.",
            step=state.step + 1,
            loss=float(log.loss),
            norm=float(log.grad_norm),
            kept=kept,
            rows=listed([*sources[:8], *(["..."] if len(sources) > 8 else [])]),
        )
    )
