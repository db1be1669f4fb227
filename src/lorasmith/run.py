"""One configuration: from data to a run folder.

RUN/config.toml        everything resolved, with the reasons of what was chosen
RUN/environment.json   versions, processor, threads
RUN/metrics.jsonl      one line a step or evaluation
RUN/samples.jsonl      answers to training.samples at every evaluation, where there are any
RUN/tensorboard/       the metrics as event files, where they are asked for
RUN/checkpoints/       the last, and the best by held-out loss
RUN/adapter/           the best if one was measured, else the last
RUN/loss.png
RUN/summary.json       written last: a run with it is finished
"""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from lorasmith.adapter_folder import end_ids, write_adapter
from lorasmith.config import Config
from lorasmith.data.plan import Plan, plan
from lorasmith.data.prepare import Prepared, prepare
from lorasmith.data.template import Template
from lorasmith.errors import ConfigError, Interrupted, MissingExtraError, RunError, TrainingError
from lorasmith.evaluate import HeldOut, compare, held_out
from lorasmith.i18n import _
from lorasmith.lora.files import has_effect
from lorasmith.lora.inject import count, inject
from lorasmith.lora.target import in_words
from lorasmith.model.base import Base
from lorasmith.model.load import load_base
from lorasmith.model.machine import dtype_name
from lorasmith.model.verify import speed_up
from lorasmith.plot import plot_loss
from lorasmith.report import Report
from lorasmith.run_folder import (
    SUMMARY,
    Summary,
    begin,
    check_folder,
    check_space,
    choose_folder,
    located,
    read_summary,
)
from lorasmith.runs import in_use
from lorasmith.training import checkpoint, loop
from lorasmith.training.checkpoint import State, write_file, writing
from lorasmith.training.dist import World, join, leave
from lorasmith.training.finish import finish_adapter
from lorasmith.training.memory import available_mib, expected_mib, memory_mib, peak_memory_mib
from lorasmith.training.metrics import Metrics, require_tensorboard
from lorasmith.training.optim import FlatParameters, make_optimizer, warmup_steps
from lorasmith.training.samples import Samples
from lorasmith.version import installed_version

ADAPTER = "default"


def train(config: Config, report: Report | None = None, resume: bool = False, overwrite: bool = False) -> Summary:
    """Train one adapter as `config` says and return what it came to; the run folder holds everything.

    Raises LorasmithError for what the user can mend, Interrupted after Ctrl-C; what was done is saved then.
    """
    started = time.perf_counter()
    world = join()
    report = report if report is not None and world.is_first else Report()
    try:
        folder = choose_folder(config, world)
        config = check_folder(folder, config, resume, overwrite)
        if not config.data.data:
            raise ConfigError(_("data.data: no file of examples is named. Name a JSON, JSONL, CSV or Parquet file."))
        if config.training.tensorboard:
            require_tensorboard()
        world.wait()  # nobody writes before all have looked
        finished = read_summary(folder) if resume else None
        if finished is not None:
            report.say(_("{run} is finished already: {summary}", run=folder, summary=finished))
            return finished
        with _resumable(folder) if resume else nullcontext():
            return _Training(config, folder, report, world).run(resume, started)
    finally:
        if world.is_ours:
            leave()


class _Training:
    """One run from the first file read to summary.json: the order of its parts, and what they hand on."""

    def __init__(self, config: Config, folder: Path, report: Report, world: World) -> None:
        self.config, self.folder, self.report, self.world = config, folder, report, world
        self.recompute = config.training.gradient_checkpointing

    def run(self, resume: bool, started: float) -> Summary:
        """Load, prepare, train, measure, write."""
        config, report = self.config, self.report
        if "model" not in config.model.model_fields_set:
            report.say(
                _(
                    "no base is named, so it is {model}, the demo's: small, and at home in English. "
                    "--model names another one.",
                    model=config.model.model,
                )
            )
        base = load_base(config.model, report)
        template = Template.of(base.tokenizer, config.data.template, end_ids(base), config.data.system)
        data = prepare(config.data, template, base.max_positions, report, config.training.seed)
        base.adapters[ADAPTER] = inject(base.model, config.lora, base.router, ADAPTER, config.training.seed)
        speed_up(base, ADAPTER, [token for example in data.train[:16] for token in example.ids])
        job = self._job(base, template, data)
        self._describe(job)
        state = self._restore(job) if resume else self._begin(job, template, data)
        with _resumable(self.folder), closing(job.metrics), self._in_use():
            before = self._measure_base(job)
            if state.step == 0:
                self._note_the_base(job, before)
            if self.recompute:
                _recompute_activations(base)
            loop.train(job, state)
            _refuse_without_effect(job)
            after = finish_adapter(job, state)
            return self._summarise(job, state, before, after, time.perf_counter() - started)

    def _in_use(self) -> AbstractContextManager[None]:
        """What `lorasmith list` knows a running training by; one process does it for all."""
        return in_use(self.folder) if self.world.is_first else nullcontext()

    def _job(self, base: Base, template: Template, data: Prepared) -> loop.Job:
        training = self.config.training
        parameters = FlatParameters(base.adapters[ADAPTER].parameters)
        notes = {
            "data": list(located(self.config).data.data),
            "max_length": data.max_length,
            "dtype": dtype_name(base.dtype),
        }

        def write(folder: Path) -> None:
            write_adapter(base, ADAPTER, template, folder, notes)

        return loop.Job(
            base=base,
            adapter=ADAPTER,
            parameters=parameters,
            optimizer=make_optimizer(parameters, training),
            plan=_plan(self.config, base, data),
            train=data.train,
            held_out=data.held_out,
            config=training,
            world=self.world,
            folder=self.folder,
            metrics=Metrics(self.folder, training.tensorboard),
            samples=Samples.of(base, template, training.samples),
            settings=_settings(base, data, self.world),
            write_adapter=write,
            report=self.report,
        )

    def _describe(self, job: loop.Job) -> None:
        """What is about to happen, before it costs time."""
        base, say = job.base, self.report.say
        adapter = base.adapters[ADAPTER]
        say(
            _(
                "base {model}: {dtype} on {device} ({why})",
                model=base.source,
                dtype=dtype_name(base.dtype),
                device=base.device,
                why=base.why["dtype"],
            )
        )
        say(_("rows: {layout}", layout=base.why["layout"]))
        say(_("fast and equal to the plain step: {parts}", parts=base.why["fast"]))
        if "plain" in base.why:
            say(_("plain, because its numbers differ: {parts}", parts=base.why["plain"]))
        for pattern, paths in adapter.targets.matched.items():
            say(_("target {pattern} matches {modules}", pattern=pattern, modules=in_words(paths)))
        for name, paths in adapter.targets.saved.items():
            say(_("{name} is copied and trained whole: {modules}", name=name, modules=", ".join(paths)))
        say(str(count(base.model, adapter)))
        say(
            _(
                "{steps} steps of {examples} examples, learning rate {rate:g} ({schedule}, {warmup} steps of warm-up)",
                steps=len(job.plan),
                examples=job.plan.step_examples,
                rate=job.config.learning_rate,
                schedule=job.config.schedule,
                warmup=warmup_steps(job.config, len(job.plan)),
            )
        )
        self._say_memory(job)
        if warmup_steps(job.config, len(job.plan)) >= len(job.plan):
            self.report.warn(
                _(
                    "training.warmup: {warmup} steps of warm-up in a run of {steps}: "
                    "the learning rate never reaches its highest value.",
                    warmup=warmup_steps(job.config, len(job.plan)),
                    steps=len(job.plan),
                )
            )
        if job.config.eval_every and not (job.held_out or job.config.samples):
            self.report.warn(_("training.eval_every: nothing is held out, so there is nothing to evaluate on."))
        if job.config.patience and not job.held_out:
            self.report.warn(_("training.patience: nothing is held out, so nothing ends the training early."))

    def _say_memory(self, job: loop.Job) -> None:
        """The peak to come and what is free; where it is not enough, activations are computed again instead."""
        if self.recompute:  # the trial did not compute them again, so it foretells nothing
            return
        expected, free = expected_mib(job.base, loop.heaviest_row(job), job.parameters.values.numel()), available_mib()
        if expected is None:
            return
        self.report.say(_("memory: about {mib:,.0f} MiB at most", mib=expected))
        taken = memory_mib()
        if free is not None and taken is not None and expected - taken > free:
            self.report.warn(
                _(
                    "that is more than the {free:,.0f} MiB that are free: activations will be computed again in "
                    "backward, which is slower. A smaller training.row_tokens needs less memory too.",
                    free=free,
                )
            )
            self.recompute = True

    def _begin(self, job: loop.Job, template: Template, data: Prepared) -> State:
        """A fresh run folder."""
        if self.world.is_first:
            check_space(self.folder, job.parameters.values.nbytes)
            reasons = {f"model.{key}": why for key, why in job.base.why.items()}
            resolved = _resolved(self.config, self.folder, job.base, template, data)
            begin(self.folder, resolved, reasons, job.settings | _versions())
        self.world.wait()
        return State()

    def _restore(self, job: loop.Job) -> State:
        """The last checkpoint put back."""
        found = checkpoint.latest(job.checkpoints)
        state = self._read(job, found) if found else State()
        if self.world.is_first:
            checkpoint.sweep(self.folder)
            job.metrics.rewind(state.step)
        self.world.wait()
        if found is None:
            self.report.say(_("no checkpoint yet in {folder}: starting from the beginning", folder=self.folder))
            return state
        checkpoint.restore(found, job.parameters, job.optimizer, state.step)
        self.report.say(_("resumed after step {step} of {steps}", step=state.step, steps=len(job.plan)))
        return state

    def _read(self, job: loop.Job, found: Path) -> State:
        state, settings = checkpoint.read_state(found)
        for key in ("train_sha256", "held_out_sha256"):
            if settings[key] != job.settings[key]:
                raise RunError(
                    _("{folder}: the examples are no longer the ones that this run began with.", folder=self.folder)
                )
        for key, value in settings.items():
            if job.settings[key] != value:
                self.report.warn(
                    _(
                        "{key} was {then} and is now {now}: the rest will not be bit for bit the same",
                        key=key,
                        then=value,
                        now=job.settings[key],
                    )
                )
        return state

    def _measure_base(self, job: loop.Job) -> HeldOut | None:
        if not job.held_out:
            return None
        return held_out(job.base, job.held_out, None, self.report, _("held-out loss of the base"), self.world)

    def _note_the_base(self, job: loop.Job, before: HeldOut | None) -> None:
        if before and self.world.is_first:
            job.metrics.append({"step": 0, "held_out_loss": before.loss})
        loop.ask(job, 0, None)

    def _summarise(
        self, job: loop.Job, state: State, before: HeldOut | None, after: HeldOut | None, seconds: float
    ) -> Summary:
        compared = compare(before, after, self.config.training.seed) if before and after else None
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
            adapter_bytes=sum(p.numel() * 4 for p in job.base.adapters[ADAPTER].parameters.values()),
            base_bytes=sum(p.numel() * p.element_size() for p in job.base.model.parameters() if not p.requires_grad),
        )
        if compared:
            self.report.say(str(compared))
        if self.world.is_first:
            self._plot()
            write_file(self.folder / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
        self.report.say(_("finished: {folder}", folder=self.folder / "adapter"))
        return summary

    def _plot(self) -> None:
        target = self.folder / "loss.png"
        try:
            with writing(target):
                plot_loss([self.folder], target)
        except MissingExtraError as error:
            self.report.warn(str(error))


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Within it, Ctrl-C says how the run in `folder` goes on, unless something in it has said what it saved."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        text = _("stopped; what was done is in {run}. Go on: lorasmith train --output {run} --resume", run=folder)
        raise Interrupted(text) from None


def _refuse_without_effect(job: loop.Job) -> None:
    """Raise TrainingError where the training came to its end and taught nothing: such a run is not finished."""
    if not has_effect(job.base.adapters[ADAPTER].parameters):
        raise TrainingError(
            _(
                "{folder}: {steps} steps are done, and the adapter has no effect: its B matrices are all zero. The "
                "learning rate was 0 or too small at every step. Give more steps (training.epochs, training.max_steps) "
                "or a shorter training.warmup, and start anew with --overwrite.",
                folder=job.folder,
                steps=len(job.plan),
            )
        )


def _recompute_activations(base: Base) -> None:
    """Gradient checkpointing, under the name that this transformers has for it."""
    new = getattr(base.model, "activation_checkpointing_enable", None)
    (new or base.model.gradient_checkpointing_enable)({"use_reentrant": False})


def _plan(config: Config, base: Base, data: Prepared) -> Plan:
    lengths = [example.useful_length for example in data.train]
    n_targets = [example.n_targets for example in data.train]
    return plan(lengths, n_targets, config.training, config.training.seed, base.layout)


def _resolved(config: Config, folder: Path, base: Base, template: Template, data: Prepared) -> Config:
    """What was left to this program is written down, so that a resumed run cannot choose otherwise."""
    config = located(config)
    model = config.model.model_copy(update={"dtype": dtype_name(base.dtype), "device": str(base.device)})
    kind = config.data.template if template.kind == "file" else template.kind
    rows = config.data.model_copy(update={"template": kind, "max_length": data.max_length})
    return config.model_copy(update={"output": str(folder.absolute()), "model": model, "data": rows})


def _settings(base: Base, data: Prepared, world: World) -> dict[str, str]:
    """What a resumed run must share to be the same bit for bit."""
    return {
        "dtype": dtype_name(base.dtype),
        "device": str(base.device),
        "layout": base.layout,
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": str(world.size),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "train_sha256": data.train_sha256,
        "held_out_sha256": data.held_out_sha256,
    }


def _versions() -> dict[str, str]:
    flags = torch.cpu.get_capabilities()
    on = sorted(name for name, value in flags.items() if value is True)
    own = installed_version() or "not installed"
    python, system = platform.python_version(), platform.platform()
    return {"lorasmith": own, "python": python, "system": system, "processor_flags": " ".join(on)}
