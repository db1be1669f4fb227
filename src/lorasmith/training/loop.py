"""The training loop: steps, evaluations, checkpoints and metrics, from a plan known whole beforehand."""

import heapq
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasmith.data.plan import Plan
from lorasmith.errors import Interrupted, TrainingError
from lorasmith.evaluate import held_out
from lorasmith.i18n import _
from lorasmith.lora.files import has_effect
from lorasmith.model.base import Base
from lorasmith.model.forward import row_of
from lorasmith.model.row import Example, Row, Step, flatten
from lorasmith.report import Report
from lorasmith.training import checkpoint
from lorasmith.training.checkpoint import State
from lorasmith.training.config import TrainingConfig
from lorasmith.training.dist import World
from lorasmith.training.interrupt import deferred
from lorasmith.training.memory import peak_memory_mib
from lorasmith.training.optim import FlatParameters, learning_rate
from lorasmith.training.step import Log, train_step

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """All that a training needs. `folder` gets metrics.jsonl and checkpoints/; `write_adapter` fills a folder."""

    base: Base
    adapter: str
    parameters: FlatParameters
    optimizer: torch.optim.Optimizer
    plan: Plan
    train: Sequence[Example]
    held_out: Sequence[Example]
    config: TrainingConfig
    world: World
    folder: Path
    settings: dict[str, str]
    write_adapter: Callable[[Path], None]
    report: Report

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder / "checkpoints"


def train(job: Job, state: State) -> None:
    """Run the steps that `state` has not done yet; `state` moves on, one step at a time.

    Raises:
        TrainingError: the loss is no longer finite. The optimiser did not move; the last good state is saved.
        Interrupted: Ctrl-C came; the state is saved.
    """

    def answer() -> None:
        job.report.warn(_("stopping once this step is done and saved; Ctrl-C again leaves at once"))

    left = sum(_tokens(job, k) for k in range(state.step, len(job.plan)))
    with deferred(answer) as wish:
        while state.step < len(job.plan):
            # before the next step, not behind the last one: a run that stopped in between then measures too
            if job.held_out and state.step and due(job.config.eval_every, state.step):
                evaluate(job, state)
            started = time.perf_counter()
            log = one_step(job, state.step, wish.came)
            if not log.is_finite():
                _stop_unfinite(job, state, log)
            left -= _tokens(job, state.step)
            _advance(job, state, log, time.perf_counter() - started, left)
            if bool(log.stop) and state.step < len(job.plan):
                raise Interrupted(
                    _("stopped after step {step}; saved in {folder}", step=state.step, folder=save(job, state))
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


def evaluate(job: Job, state: State) -> float:
    """The held-out loss now; the best adapter so far is kept in checkpoints/best-STEP."""
    loss = held_out(job.base, job.held_out, job.adapter, job.report, _("held-out loss"), job.world).loss
    if job.world.is_first:
        append_metrics(job, {"step": state.step, "held_out_loss": loss})
    # during the warm-up's first step an adapter is still the base: that is no adapter to keep
    if has_effect(job.base.adapters[job.adapter].parameters) and (state.best_loss is None or loss < state.best_loss):
        state.best_loss, state.best_step = loss, state.step
        if job.world.is_first:
            checkpoint.write_folder(best_folder(job, state), job.write_adapter)
    return loss


def best_folder(job: Job, state: State) -> Path:
    """Where the best adapter so far lies."""
    return job.checkpoints / checkpoint.best_name(state)


def save(job: Job, state: State) -> Path:
    """A checkpoint of the state as it is."""
    folder = job.checkpoints / f"step-{state.step:06d}"
    if job.world.is_first:
        checkpoint.save(job.checkpoints, state, job.parameters, job.optimizer, job.settings, job.write_adapter)
    job.world.wait()
    return folder


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
        append_metrics(job, {
            "step": state.step, "epoch": job.plan.epoch(k), "loss": loss, "grad_norm": float(log.grad_norm),
            "learning_rate": job.optimizer.param_groups[0]["lr"], "tokens": state.tokens,
            "targets": job.plan.targets(k), "tokens_per_second": tokens / seconds, "seconds": state.seconds,
            "peak_memory_mib": memory,
        })  # fmt: skip
    job.report.progress(
        _("training"), state.step, len(job.plan),
        loss=loss, tokens_per_second=rate, seconds_left=tokens_left / rate, memory_mib=memory,
    )  # fmt: skip


def _stop_unfinite(job: Job, state: State, log: Log) -> None:
    """Say which step and rows, keep the last good state, and stop."""
    sources = sorted(job.train[i].source for i in job.plan.members(state.step))
    where = save(job, state) if state.step else None
    kept = _("the state before it is saved in {folder}", folder=where) if where else _("nothing was learned before it")
    raise TrainingError(
        _(
            "step {step}: loss {loss}, gradient norm {norm}: not finite, so the optimiser did not move; {kept}. "
            "Its rows: {rows}. A lower training.learning_rate or model.dtype float32 is the usual mend.",
            step=state.step + 1,
            loss=float(log.loss),
            norm=float(log.grad_norm),
            kept=kept,
            rows=", ".join(sources[:8]) + (", ..." if len(sources) > 8 else ""),
        )
    )


def append_metrics(job: Job, values: dict[str, float]) -> None:
    """One line of metrics.jsonl, on disk before the next step."""
    path = job.folder / METRICS
    with checkpoint.writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def rewind_metrics(job: Job, step: int) -> None:
    """Take out what a run resumed after `step` writes again: later lines, and the evaluation before the next step."""
    path = job.folder / METRICS
    if path.is_file():
        lines = [line for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if _was_done(json.loads(line), step)]
        checkpoint.write_file(path, "".join(line + "\n" for line in kept))


def _was_done(values: dict[str, float], step: int) -> bool:
    return values["step"] < step or (values["step"] == step and "loss" in values)
