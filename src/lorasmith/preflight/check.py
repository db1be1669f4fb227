"""The checks of `lorasmith check`: everything that a training would do, found out without training."""

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.config.toml import Config
from lorasmith.data.dataset.by_name import configs_by_name
from lorasmith.data.dataset.prepare import read_files
from lorasmith.errors import LorasmithError, ModelError, RunError
from lorasmith.i18n import _
from lorasmith.loading.shared import SharedBase
from lorasmith.preflight.dry_run import dry_run
from lorasmith.preflight.estimate import Estimate, estimate
from lorasmith.preflight.facts import Facts, collect_facts
from lorasmith.preflight.lengths import Bar, histogram
from lorasmith.preflight.measurements import load_measurement, measurement_path, save_measurement
from lorasmith.preflight.rows import RowPreview, ends_with_stop_token, preview_rows
from lorasmith.report import Report
from lorasmith.training import loop
from lorasmith.training.assemble import Assembled, LoadBase, assemble, recompute_activations
from lorasmith.training.distributed import World
from lorasmith.training.loop import Job
from lorasmith.training.run_folder import check_folder, check_space


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    problems: what makes a training fail or go wrong; warnings: what does not; notes: what was done to the rows. Facts,
    rows and lengths are None or empty if the base model or the data could not be loaded.
    """

    problems: list[str]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Facts | None = None
    max_length: int = 0
    stop_tokens: tuple[str, ...] = ()
    rows: list[RowPreview] = field(default_factory=list)
    lengths: list[Bar] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """2 if there are problems, else 0."""
        return 2 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; the keys are the names of the fields."""
        return asdict(self)


class _CollectingReport(Report):
    """Collects messages and warnings, and passes progress on."""

    def __init__(self, outer: Report) -> None:
        self.notes, self.warnings, self.outer = list[str](), list[str](), outer

    def say(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        self.outer.progress(task, done, total, **numbers)


def check(config: Config, report: Report | None = None, load: LoadBase | None = None) -> CheckResult:
    """Check a training with `config`: load everything and do a dry run. Nothing is written, except into the cache.

    load: gives the base model.
    """
    began, collected = time.perf_counter(), _CollectingReport(report or Report())
    with tempfile.TemporaryDirectory(prefix="lorasmith-check-") as folder:
        try:
            assembled = assemble(config, Path(folder), collected, World(), load=load)
        except LorasmithError as error:
            problems = [*error.problems, *(_data_problems(config) if isinstance(error, ModelError) else [])]
            return CheckResult([*problems, *_output_problems(config)], collected.warnings, collected.notes)
        return _check_assembled(assembled, collected, time.perf_counter() - began)


def check_each(config: Config, report: Report | None = None) -> dict[str, CheckResult]:
    """Check the training of each adapter, alone, over one base model; data.data has the form NAME=FILE.

    Their memory and time are those of training them one after the other: at once they take more of the one, and less of
    the other.
    """
    load, folder = SharedBase(), Path(config.output).expanduser() if config.output else None
    return {name: check(one, report, load) for name, one in configs_by_name(config, folder).items()}


def _check_assembled(assembled: Assembled, collected: _CollectingReport, start: float) -> CheckResult:
    """`start`: seconds that loading took."""
    job, template, config = assembled.job, assembled.template, assembled.config
    rows, lengths = preview_rows(job.train, template), histogram(job.train, template.stop_ids)
    facts = collect_facts(job, _estimate(job, config, start))
    return CheckResult(
        problems=[*facts.problems, *_stop_problems(job, template.stop_ids), *_output_problems(config, job)],
        warnings=[*collected.warnings, *facts.warnings],
        notes=collected.notes,
        facts=facts,
        max_length=assembled.data.max_length,
        stop_tokens=tuple(str(template.tokenizer.convert_ids_to_tokens(i)) for i in template.stop_ids),
        rows=rows,
        lengths=lengths,
    )


def _estimate(job: Job, config: Config, start: float) -> Estimate:
    """Memory and time from an earlier measurement, else from a dry run.

    The dry run recomputes activations if the trial step says that memory would not be enough without.
    """
    path = measurement_path(job, config)
    known, recompute = load_measurement(path), job.config.gradient_checkpointing
    trial = estimate(job, known, recompute)
    if known is not None:
        return trial
    if trial.recompute:
        recompute_activations(job.base)
    measurement = dry_run(job, start)
    if measurement is None:
        text = _("the loss of the first steps is not finite. Setting model.dtype to float32 usually fixes this.")
        return Estimate(recompute=trial.recompute, problems=[text])
    if trial.recompute == recompute:
        save_measurement(path, measurement)
    after = estimate(job, measurement, trial.recompute)
    warnings = [*dict.fromkeys((*trial.warnings, *after.warnings))]
    return Estimate(after.peak_mib, after.free_mib, after.seconds, after.by, after.recompute, warnings)


def _stop_problems(job: Job, stop_ids: tuple[int, ...]) -> list[str]:
    """A problem if no row ends with a stop token, since the model would not learn to stop."""
    if any(ends_with_stop_token(example, stop_ids) for example in job.train):
        return []
    return [
        _(
            "data.max_length: every row is truncated before its stop token, so the model would not learn to "
            "stop. Increase data.max_length."
        )
    ]


def _data_problems(config: Config) -> list[str]:
    """What is wrong with the data files, if the base model to encode them for could not be loaded."""
    try:
        read_files(config.data, Report(), config.training.method)
    except LorasmithError as error:
        return list(error.problems)
    return []


def _output_problems(config: Config, job: Job | None = None) -> list[str]:
    """Why the run could not be written to `output`; whether it has enough space, if there is a `job`."""
    if config.output is None:
        return []
    folder = Path(config.output).expanduser()
    try:
        check_folder(folder, config, resume=False, overwrite=False)
        if job is not None:
            check_space(folder, loop.disk_bytes(job))
    except RunError as error:
        return list(error.problems)
    return []
