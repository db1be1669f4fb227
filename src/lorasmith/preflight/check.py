"""All that `lorasmith check` finds out: facts, rows, lengths, problems and warnings, for any way of showing them."""

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.config.toml import Config
from lorasmith.data.dataset.prepare import read_files
from lorasmith.errors import LorasmithError, ModelError, RunError
from lorasmith.i18n import _
from lorasmith.preflight.dry import dry_run
from lorasmith.preflight.estimate import Expected, expect
from lorasmith.preflight.facts import Facts, facts_of
from lorasmith.preflight.lengths import Bar, histogram
from lorasmith.preflight.measured import place_of, recall, remember
from lorasmith.preflight.rows import Shown, shown_rows, stops
from lorasmith.report import Report
from lorasmith.training.assemble import Assembled, assemble, recompute_activations
from lorasmith.training.distributed import World
from lorasmith.training.loop import Job
from lorasmith.training.run_folder import check_folder, check_space


@dataclass(frozen=True)
class Checked:
    """`problems` make a training wrong or impossible; `warnings` do not. Facts and rows are None or empty without base
    or rows. `notes` say what was done to rows."""

    problems: list[str]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Facts | None = None
    max_length: int = 0
    stop_tokens: tuple[str, ...] = ()
    rows: list[Shown] = field(default_factory=list)
    lengths: list[Bar] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """2 where a training would be wrong, else 0."""
        return 2 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return asdict(self)


class _Listening(Report):
    """Keeps sentences for later, lets progress through."""

    def __init__(self, outer: Report) -> None:
        self.said, self.warned, self.outer = list[str](), list[str](), outer

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        self.outer.progress(task, done, total, **numbers)


def check(config: Config, report: Report | None = None) -> Checked:
    """Everything that a training with `config` would do, as far as it can be found out; nothing is written for it."""
    began, heard = time.perf_counter(), _Listening(report or Report())
    with tempfile.TemporaryDirectory(prefix="lorasmith-check-") as folder:
        try:
            assembled = assemble(config, Path(folder), heard, World())
        except LorasmithError as error:
            problems = [*error.problems, *(_of_files(config) if isinstance(error, ModelError) else [])]
            return Checked([*problems, *_of_output(config, 0)], heard.warned, heard.said)
        return _looked_at(assembled, config, heard, time.perf_counter() - began)


def _looked_at(assembled: Assembled, config: Config, heard: _Listening, start: float) -> Checked:
    job, template = assembled.job, assembled.template
    rows, lengths = shown_rows(job.train, template), histogram(job.train, template.stop_ids)
    expected = _measured(job, config, start)
    facts = facts_of(job, expected)
    return Checked(
        problems=[*facts.problems, *_never_stops(job, template.stop_ids), *_of_output(config, _bytes(job))],
        warnings=[*heard.warned, *facts.warnings],
        notes=heard.said,
        facts=facts,
        max_length=assembled.data.max_length,
        stop_tokens=tuple(str(template.tokenizer.convert_ids_to_tokens(i)) for i in template.stop_ids),
        rows=rows,
        lengths=lengths,
    )


def _measured(job: Job, config: Config, start: float) -> Expected:
    """From what was measured before, else from a dry run; it is left out where memory would not be enough for it."""
    place = place_of(job, config)
    known, recompute = recall(place), job.config.gradient_checkpointing
    trial = expect(job, known, recompute)
    if known is not None:
        return trial
    if trial.recompute:
        recompute_activations(job.base)
    found = dry_run(job, start)
    if found is None:
        text = _("the loss of the first steps is not finite. Setting model.dtype to float32 usually fixes this.")
        return Expected(recompute=trial.recompute, problems=[text])
    if trial.recompute == recompute:
        remember(place, found)
    after = expect(job, found, trial.recompute)
    return Expected(after.peak_mib, after.free_mib, after.seconds, after.by, after.recompute, trial.warnings)


def _never_stops(job: Job, stop_ids: tuple[int, ...]) -> list[str]:
    """A problem where no row teaches the model to stop."""
    if any(stops(example, stop_ids) for example in job.train):
        return []
    return [
        _(
            "data.max_length: every row is truncated before its stop token, so the model would not learn to "
            "stop. Increase data.max_length."
        )
    ]


def _of_files(config: Config) -> list[str]:
    """What is wrong with the files of rows themselves, where there is no base to encode them for."""
    try:
        read_files(config.data, Report())
    except LorasmithError as error:
        return list(error.problems)
    return []


def _of_output(config: Config, adapter_bytes: int) -> list[str]:
    """Why the run could not be written where --output says."""
    if config.output is None:
        return []
    folder = Path(config.output).expanduser()
    try:
        check_folder(folder, config, resume=False, overwrite=False)
        check_space(folder, adapter_bytes)
    except RunError as error:
        return list(error.problems)
    return []


def _bytes(job: Job) -> int:
    return int(job.parameters.values.nbytes)
