"""A few steps on the longest rows, an evaluation and a save, all thrown away: memory and time before a run begins."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorasmith.data.dataset.plan import rows_of
from lorasmith.evaluation.loss import EVAL_ROW_TOKENS, held_out
from lorasmith.i18n import _
from lorasmith.model.forward import row_of
from lorasmith.model.row import Example, Row, Step
from lorasmith.preflight.estimate import growth_mib
from lorasmith.preflight.measured import Measured
from lorasmith.system.memory import peak_memory_mib
from lorasmith.training import loop
from lorasmith.training.checkpoint import State
from lorasmith.training.loop import Job
from lorasmith.training.step import train_step

LOOKED_AT = 200  # steps of the plan whose rows are looked through for usual ones


def dry_run(job: Job, start: float) -> Measured | None:
    """Train on the heaviest row and two usual ones, evaluate, save into a folder that goes.

    `start`: seconds that came before. The adapter in `job` is spoilt afterwards. None where the loss was not finite:
    then a training would stop at once.
    """
    task, rows = _("dry run"), [loop.heaviest_row(job), *_usual(job)]
    parts = _longest_held_out(job)
    took = list[float]()
    job.report.progress(task, 0, len(rows) + len(parts) + 1)
    for row in rows:
        began = time.perf_counter()
        log = train_step(job.base, job.parameters, job.optimizer, Step((row,), 1), job.config.clip, job.world)
        if not log.is_finite():
            return None
        took.append(time.perf_counter() - began)
        job.report.progress(task, len(took), len(rows) + len(parts) + 1)
    evaluated = 0.0
    for number, part in enumerate(parts, 1):
        began = time.perf_counter()
        held_out(job.base, part, job.adapter)
        evaluated += time.perf_counter() - began
        job.report.progress(task, len(rows) + number, len(rows) + len(parts) + 1)
    saved = _save(job)
    job.report.progress(task, len(rows) + len(parts) + 1, len(rows) + len(parts) + 1)
    usual = sum(took[1:]) / sum(row.tokens for row in rows[1:]) if rows[1:] else took[0] / rows[0].tokens
    tokens = sum(example.useful_length for part in parts for example in part)
    return Measured(
        peak_mib=peak_memory_mib(job.base.device) + growth_mib(job.base, rows[0], len(job.plan) - len(rows)),
        start=start,
        first=max(0.0, took[0] - usual * rows[0].tokens),
        token=usual,
        held_out_token=evaluated / tokens if tokens else 0.0,
        save=saved,
        by="dry step",
    )


def _usual(job: Job) -> list[Row]:
    """A row that a third of the plan's is longer than, and one that a third is shorter than; none of a tiny plan."""
    steps = range(min(len(job.plan), job.plan.steps_per_epoch, LOOKED_AT))
    rows = [row for k in steps for row in job.plan.of_rank(k, 0, 1)]
    rows.sort(key=lambda row: sum(job.plan.lengths[i] for i in row))
    if len(rows) < 3:
        return []
    chosen = [rows[len(rows) // 3], rows[2 * len(rows) // 3]]
    examples = [[job.train[i] for i in row] for row in chosen]
    return [row_of(job.base, row, sum(e.weight for e in row), job.adapter) for row in examples]


def _longest_held_out(job: Job) -> list[Sequence[Example]]:
    """The examples of the first two rows of an evaluation, its longest."""
    rows = rows_of([e.useful_length for e in job.held_out], EVAL_ROW_TOKENS, job.base.layout)
    return [[job.held_out[i] for i in row] for row in rows[:2]]


def _save(job: Job) -> float:
    """Seconds that a checkpoint takes."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lorasmith-dry-") as folder:
        loop.save(replace(job, folder=Path(folder)), State(step=1))
        return time.perf_counter() - began
