"""A dry run: a few steps, an evaluation and a checkpoint, all discarded, to measure memory and time before training."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorasmith.data.dataset.plan import pack_rows
from lorasmith.evaluation.loss import EVAL_ROW_TOKENS, evaluate_loss
from lorasmith.i18n import _
from lorasmith.model.row import Example, Row, Step
from lorasmith.preflight.estimate import growth_mib
from lorasmith.preflight.measurements import Measurement
from lorasmith.system.memory import peak_memory_mib
from lorasmith.training import loop
from lorasmith.training.checkpoint import State
from lorasmith.training.loop import Job
from lorasmith.training.step import train_step

SAMPLED_STEPS = 200  # steps of the plan among whose rows typical ones are chosen


def dry_run(job: Job, start: float) -> Measurement | None:
    """Train on the heaviest row and two typical ones, evaluate, and save into a temporary folder.

    start: seconds that loading took. The adapter in `job` is of no use afterwards. Returns None if a loss was not
    finite: a training would stop at once.
    """
    task, rows = _("dry run"), [loop.heaviest_row(job), *_typical_rows(job)]
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
        evaluate_loss(job.base, part, job.adapter)
        evaluated += time.perf_counter() - began
        job.report.progress(task, len(rows) + number, len(rows) + len(parts) + 1)
    saved = _save(job)
    job.report.progress(task, len(rows) + len(parts) + 1, len(rows) + len(parts) + 1)
    per_token = sum(took[1:]) / sum(row.tokens for row in rows[1:]) if rows[1:] else took[0] / rows[0].tokens
    tokens = sum(example.useful_length for part in parts for example in part)
    return Measurement(
        peak_mib=peak_memory_mib(job.base.device) + growth_mib(job.base, rows[0], len(job.plan) - len(rows)),
        start=start,
        first=max(0.0, took[0] - per_token * rows[0].tokens),
        token=per_token,
        held_out_token=evaluated / tokens if tokens else 0.0,
        save=saved,
        by="dry step",
    )


def _typical_rows(job: Job) -> list[Row]:
    """The rows at one third and at two thirds of the plan's rows by length; none if the plan has fewer than three."""
    steps = range(min(len(job.plan), job.plan.steps_per_epoch, SAMPLED_STEPS))
    rows = [row for k in steps for row in job.plan.of_rank(k, 0, 1)]
    rows.sort(key=lambda row: sum(job.plan.lengths[i] for i in row))
    if len(rows) < 3:
        return []
    chosen = [rows[len(rows) // 3], rows[2 * len(rows) // 3]]
    return [job.row(row, sum(e.weight for e in job.examples(row))) for row in chosen]


def _longest_held_out(job: Job) -> list[Sequence[Example]]:
    """The examples of the first two rows of an evaluation, which are its longest."""
    rows = pack_rows([e.useful_length for e in job.held_out], EVAL_ROW_TOKENS, job.base.layout)
    return [[job.held_out[i] for i in row] for row in rows[:2]]


def _save(job: Job) -> float:
    """Seconds that writing a checkpoint takes."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lorasmith-dry-") as folder:
        loop.save(replace(job, folder=Path(folder)), State(step=1))
        return time.perf_counter() - began
