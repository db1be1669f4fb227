"""One training run, from a configuration to a run folder:

RUN/.lorasmith         marks the folder as ours; .lorasmith.lock exists beside it while a process trains
RUN/config.toml        all options as resolved, with the reasons for automatic choices
RUN/environment.json   versions, processor, number of threads, hashes of base model and data
RUN/metrics.jsonl      one line per step or evaluation
RUN/reference.safetensors  what the model said of preferences before the training, if it is on preferences
RUN/samples.jsonl      answers to the prompts of training.samples at every evaluation
RUN/tensorboard/       the metrics as event files, if training.report_to has tensorboard
RUN/checkpoints/       the last checkpoint, and the best adapter by held-out loss
RUN/adapter/           the best adapter by held-out loss, or the last one if nothing is held out
RUN/model/             the same of the whole model, if the method is full fine-tuning
RUN/loss.png           the loss curve
RUN/summary.json       the results; written last, so a run that has it is finished
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch

from lorasmith.config.toml import Config
from lorasmith.data.dataset.prepare import Prepared, read_files
from lorasmith.data.template.encoding import Template
from lorasmith.errors import Interrupted, MissingExtraError, TrainingError
from lorasmith.evaluation.loss import Comparison, ExampleLosses, compare
from lorasmith.evaluation.preference import PreferenceLosses, compare_preferences
from lorasmith.i18n import _
from lorasmith.lora.quantized import stored_bytes
from lorasmith.lora.saved_values import has_moved
from lorasmith.model.base import Base
from lorasmith.preflight.estimate import estimate
from lorasmith.preflight.facts import collect_facts, fact_lines
from lorasmith.preflight.measurements import (
    Measurement,
    load_measurement,
    measurement_of_run,
    measurement_path,
    save_measurement,
)
from lorasmith.report import Report
from lorasmith.runs.plot import plot_loss
from lorasmith.system.device import dtype_name
from lorasmith.system.memory import peak_memory_mib
from lorasmith.system.writing import write_file, writing
from lorasmith.training import checkpoint, loop
from lorasmith.training.assemble import ADAPTER, Assembled, LoadBase, assemble, recompute_activations
from lorasmith.training.checkpoint import Origin, State
from lorasmith.training.distributed import World, join, leave
from lorasmith.training.preference import Reference
from lorasmith.training.race import race
from lorasmith.training.resume import restored_state
from lorasmith.training.run_files import CHECKPOINTS, LOSS_PLOT, REFERENCE, SUMMARY, Summary, read_summary, recover_run
from lorasmith.training.run_folder import (
    check_folder,
    check_space,
    choose_folder,
    public_options,
    run_id,
    run_lock,
    start_run,
    with_absolute_paths,
)
from lorasmith.training.trackers import TrackedRun
from lorasmith.version import installed_version


class Measure(Protocol):
    """Measures more of a run than training does; a study does."""

    def started(self, job: loop.Job) -> None:
        """Called before the first step, also of a resumed run: the model is still the base model."""

    def known(self, job: loop.Job) -> ExampleLosses | None:
        """The held-out losses of the base model, if they have been computed before."""

    def finished(self, job: loop.Job, before: ExampleLosses | None, after: ExampleLosses | None) -> None:
        """Called with the trained model and the held-out losses before and after, before the run is finished."""


def train(
    config: Config, report: Report | None = None, resume: bool = False, overwrite: bool = False,
    load: LoadBase | None = None, measure: Measure | None = None,
) -> Summary:  # fmt: skip
    """Train one adapter as `config` says and return the results, which the run folder also holds.

    resume: continue the run in `config.output`.
    overwrite: replace the run in `config.output`.
    load: gives the base model; runs that follow each other share one with `SharedBase`.
    measure: measures more of the run, before and after the training.

    Raises:
        LorasmithError: a problem that the user can fix.
        Interrupted: the user pressed Ctrl-C; the progress is saved.
    """
    started = time.perf_counter()
    world = join()
    report = report if report is not None and world.is_first else Report()
    try:
        folder = choose_folder(config, world)
        with run_lock(folder, world, report, resume):
            config = check_folder(folder, config, resume, overwrite)
            world.barrier()  # no process writes before all have checked the folder
            finished = read_summary(folder) if resume else None
            if finished is not None:
                report.say(_("{run} has already finished: {summary}", run=folder, summary=finished))
                return finished
            with resumable(folder) if resume else nullcontext():
                return Training(config, folder, report, world, overwrite, load, measure).run(resume, started)
    finally:
        if world.owns_group:
            leave()


class Training:
    """The phases of one run, from reading the data to writing summary.json."""

    def __init__(
        self, config: Config, folder: Path, report: Report, world: World, overwrite: bool,
        load: LoadBase | None = None, measure: Measure | None = None,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.report, self.world = config, folder, report, world
        self.overwrite, self.load, self.measure = overwrite, load, measure
        self.recompute = config.training.gradient_checkpointing
        self.resume = False
        self.reasons: dict[str, str] = {}
        self.saved: Path | None = None
        self.assembled: Assembled
        self.job: loop.Job
        self.state: State
        self.before: ExampleLosses | None = None
        self.started = self.prepared = self.evaluation_seconds = 0.0

    def run(self, resume: bool, started: float) -> Summary:
        """Load, prepare, train, evaluate, write. `started` is the perf_counter() at which the run began."""
        self.prepare(resume, started)
        self.open()
        job, state = self.job, self.state
        is_representative = state.step == 0 and self.recompute == self.config.training.gradient_checkpointing
        is_representative &= job.preference is None  # whose first evaluation is part of what is measured before
        with resumable(self.folder), job.history:
            self.begin()
            if self.recompute:
                recompute_activations(job.base)
            loop.train(job, state)
            summary = self.finish()
        if is_representative and self.world.is_first:
            seconds = self.prepared - started, self.evaluation_seconds, state.seconds, summary.seconds
            save_measurement(self.measurements, measurement_of_run(job, *seconds))
        return summary

    def prepare(self, resume: bool, started: float, name: str = ADAPTER) -> None:
        """Read the data, load the base model and make the job; nothing is written yet. name: the adapter's."""
        self.resume, self.started = resume, started
        files = read_files(
            self.config.data, self.report, self.config.training.method
        )  # first, to report invalid rows before a base model is loaded
        self.saved = self._last_checkpoint() if resume else None
        self.assembled = assemble(self.config, self.folder, self.report, self.world, files, self.saved, self.load, name)
        self.job, self.config = self.assembled.job, self.assembled.config
        self.measurements = measurement_path(self.job, self.config)
        self._describe(self.job, load_measurement(self.measurements))
        if self.config.training.learning_rate == "auto":
            self._race()

    def _race(self) -> None:
        """Choose the learning rate; from here on, everything is as if it had been given."""
        found = race(self.job, self.report)
        self.reasons["training.learning_rate"] = found.why
        training = self.config.training.model_copy(update={"learning_rate": found.rate})
        self.config = self.config.model_copy(update={"training": training})
        options = self.job.origin.options | {"training.learning_rate": json.dumps(found.rate)}
        origin = Origin(self.job.origin.settings, options)
        self.job = replace(self.job, config=training, origin=origin)

    def open(self) -> None:
        """Write the first files of a new run, or restore the state of the one that is resumed."""
        if self.measure:
            self.measure.started(self.job)
        if self.resume:
            if not self.job.preference:
                # before all weights of the base model, if these are trained, get the values of the checkpoint
                self.before = self._base_losses()
            self.state = self._restore(self.job, self.saved)
        else:
            self.state = self._start(self.job, self.config, self.assembled.template, self.assembled.data)

    def begin(self, before: ExampleLosses | None = None) -> None:
        """Measure the base model. before: its held-out losses, if they are known. Within `job.history`."""
        self._track(self.job, self.config)
        self.prepared = time.perf_counter()
        self.before = before or self.before or self._base_losses()
        self.evaluation_seconds = time.perf_counter() - self.prepared
        if self.state.step == 0:
            self.job.evaluator.record_base(self.before)

    def _base_losses(self) -> ExampleLosses | None:
        known = self.measure.known(self.job) if self.measure else None
        return known or self.job.evaluator.base_losses()

    def finish(self) -> Summary:
        """Evaluate the trained adapter and write it, with the results."""
        job, state = self.job, self.state
        _refuse_without_effect(job)
        after = job.evaluator.finish(state, is_last=state.step == len(job.plan))
        if self.measure:
            self.measure.finished(job, self.before, after)
        return self._summarize(job, state, self.before, after, time.perf_counter() - self.started)

    def _describe(self, job: loop.Job, measurement: Measurement | None) -> None:
        """Report what the run will do, need and cost. Raises TrainingError if it cannot succeed."""
        facts = collect_facts(job, estimate(job, measurement, self.recompute))
        self.recompute = facts.expected.recompute
        for line in fact_lines(facts):
            self.report.say(line)
        for text in facts.warnings:
            self.report.warn(text)
        if facts.problems:
            raise TrainingError(*facts.problems)

    def _start(self, job: loop.Job, config: Config, template: Template, data: Prepared) -> State:
        """Write the first files of a new run."""
        if self.world.is_first:
            check_space(self.folder, loop.disk_bytes(job))
            reasons = self.reasons | {f"model.{key}": why for key, why in job.base.why.items()}
            resolved = _resolved(config, self.folder, job.base, template, data)
            start_run(self.folder, resolved, reasons, job.origin.settings | _versions(), self.overwrite)
        self._measure_start(job)
        return State()

    def _measure_start(self, job: loop.Job) -> None:
        """Let the model say of the preferences, if the training is on some, what it says before the first step."""
        if job.preference:
            reference = job.preference.measure(job.base, job.adapter, self.report, self.world)
            if self.world.is_first:
                reference.save(self.folder / REFERENCE)
        self.world.barrier()

    def _track(self, job: loop.Job, config: Config) -> None:
        """Begin or resume the run in the trackers of training.report_to. Raises ConfigError if one cannot."""
        if self.world.is_first and config.training.trackers:
            run = TrackedRun(self.folder.absolute().name, run_id(self.folder), public_options(config))
            job.history.trackers.open(run)

    def _last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, after cleaning up what a kill left; None if there is none yet."""
        if self.world.is_first:
            recover_run(self.folder)
        self.world.barrier()
        return checkpoint.latest(self.folder / CHECKPOINTS)

    def _restore(self, job: loop.Job, saved: Path | None) -> State:
        """Restore the checkpoint `saved`, if there is one."""
        state = restored_state(job, saved, self.folder, self.report)
        if self.world.is_first:
            job.history.rewind(state.step)
        self.world.barrier()
        if saved is None:
            self.report.say(_("No checkpoint in {folder} yet; starting from the beginning", folder=self.folder))
            self._measure_start(job)
            return state
        if job.preference:
            job.preference.reference = Reference.load(self.folder / REFERENCE)
        checkpoint.restore(saved, job.parameters, job.optimizer, state.step)
        self.report.say(_("Resuming after step {step} of {steps}", step=state.step, steps=len(job.plan)))
        return state

    def _summarize(
        self, job: loop.Job, state: State, before: ExampleLosses | None, after: ExampleLosses | None, seconds: float
    ) -> Summary:
        compared, scores = _compared(before, after, self.config.training.seed)
        summary = Summary(
            run=str(self.folder),
            loss_before=compared.before if compared else None,
            loss_after=compared.after if compared else None,
            interval=(compared.low, compared.high) if compared else None,
            tokens_per_second=state.tokens / state.seconds,
            peak_memory_mib=peak_memory_mib(job.base.device),
            seconds=seconds,
            steps=state.step,
            best_step=state.best_step if compared else None,
            stopped_early=state.step < len(job.plan),
            tokens=state.tokens,
            trainable_parameters=job.parameters.values.numel(),
            adapter_bytes=job.artifact.bytes,
            base_bytes=stored_bytes(job.base.model),
            train_examples=len(job.plan.lengths),
            held_out_examples=compared.examples if compared else len(job.held_out),
            **scores,
        )
        if compared:
            self.report.say(str(compared))
        if self.world.is_first:
            self._plot()
            write_file(self.folder / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
        place = self.folder / job.artifact.name
        self.report.say(
            _("Finished. The model is in {folder}", folder=place)
            if job.base.adapters[job.adapter].is_whole_model
            else _("Finished. The adapter is in {folder}", folder=place)
        )
        return summary

    def _plot(self) -> None:
        target = self.folder / LOSS_PLOT
        try:
            with writing(target):
                plot_loss([self.folder], target)
        except MissingExtraError as error:
            self.report.warn(str(error))


def _compared(
    before: ExampleLosses | None, after: ExampleLosses | None, seed: int
) -> tuple[Comparison | None, dict[str, Any]]:
    """The comparison of the held-out losses, if there are any, and what the summary says besides."""
    if before is None or after is None:
        return None, {}
    if not isinstance(before, PreferenceLosses) or not isinstance(after, PreferenceLosses):
        return compare(before, after, seed), {}
    found = compare_preferences(before, after, seed)
    scores = {"accuracy": found.accuracy, "accuracy_interval": found.accuracy_interval}
    if not math.isnan(found.margin):
        scores |= {"margin": found.margin, "margin_interval": found.margin_interval}
    return found, scores


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """A context in which Ctrl-C raises Interrupted with the command that resumes the run in `folder`."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        text = _(
            "Interrupted. Saved progress is in {run}. Resume with: lorasmith train --output {run} --resume", run=folder
        )
        raise Interrupted(text) from None


def _refuse_without_effect(job: loop.Job) -> None:
    """Raise TrainingError if the adapter still has no effect after the last step, so that the run never finishes."""
    if not has_moved(job.base.adapters[job.adapter], job.base.model):
        raise TrainingError(
            _(
                "{folder}: after {steps} steps the adapter has no effect: its B matrices are all zero, because "
                "the learning rate was 0 or too small at every step. Train for more steps (training.epochs, "
                "training.max_steps) or shorten training.warmup, and start again with --overwrite.",
                folder=job.folder,
                steps=len(job.plan),
            )
        )


def _resolved(config: Config, folder: Path, base: Base, template: Template, data: Prepared) -> Config:
    """The configuration with every automatic choice made explicit, so that a resumed run makes the same ones."""
    config = with_absolute_paths(config)
    model = config.model.model_copy(update={"dtype": dtype_name(base.dtype), "device": str(base.device)})
    kind = template.kind if config.data.template == "auto" else config.data.template
    rows = config.data.model_copy(update={"template": kind, "max_length": data.max_length})
    return config.model_copy(update={"output": str(folder.absolute()), "model": model, "data": rows})


def _versions() -> dict[str, str]:
    flags = torch.cpu.get_capabilities()
    on = sorted(name for name, value in flags.items() if value is True)
    own = installed_version() or "not installed"
    python, system = platform.python_version(), platform.platform()
    found = {"lorasmith": own, "python": python, "system": system, "processor_flags": " ".join(on)}
    return found | {"run_id": uuid4().hex}
