"""Several training runs over one base model: each gets an ordinary run folder, and the adapter that it would get alone.

The base model is loaded once. A step computes the examples of all adapters in one forward and backward pass, in which
each token has its own adapter. Loss, clipping, optimizer, schedule, evaluation and checkpoints are each adapter's own.
"""

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from itertools import groupby
from os.path import commonpath
from pathlib import Path

from lorasmith.config.model import ModelConfig
from lorasmith.config.toml import Config, to_toml
from lorasmith.data.dataset.by_name import configs_by_name, files_by_name
from lorasmith.errors import ConfigError, LorasmithError, RunError, TrainingError
from lorasmith.evaluation.loss import ExampleLosses
from lorasmith.i18n import _, counted
from lorasmith.model.base import Base
from lorasmith.model.verify import use_fast_parts
from lorasmith.report import Report
from lorasmith.runs.train import Measure, Training, resumable, train
from lorasmith.system.writing import write_file, writing
from lorasmith.training import loop
from lorasmith.training.assemble import LoadBase, recompute_activations
from lorasmith.training.at_once import not_at_once, why_alone
from lorasmith.training.distributed import join
from lorasmith.training.run_files import GROUP_CONFIG, Summary, is_run, read_summary
from lorasmith.training.run_folder import check_folder, choose_folder, run_lock, with_absolute_paths


def train_all(
    configs: Sequence[Config], report: Report | None = None, resume: bool = False, overwrite: bool = False
) -> list[Summary]:
    """Train an adapter for each configuration and return their results, in the same order.

    Those with the same options of the base model share it. Those that cannot share it, or that cannot be computed in
    one pass with others, are trained one after the other, and `report` says why.
    resume: continue those whose run folder exists, and start the others.

    Raises:
        LorasmithError: problems that the user can fix, of all configurations; nothing was trained.
        TrainingError: some of the runs failed. The others have finished, as their run folders show.
        Interrupted: the user pressed Ctrl-C; the progress of all runs is saved.
    """
    report, world = report or Report(), join()
    alone = {i: why for i, config in enumerate(configs) if (why := why_alone(config, world))}
    shared = [i for i in range(len(configs)) if i not in alone]
    key = lambda i: configs[i].model.model_dump_json()  # noqa: E731
    groups = [list(group) for _key, group in groupby(sorted(shared, key=key), key)]
    results: dict[int, Summary | LorasmithError] = {}
    names = _names(configs)
    for members in sorted(groups):
        reports = [Named(names[i], report) for i in members]
        found = Group([configs[i] for i in members], reports, report).train(resume, overwrite)
        results |= dict(zip(members, found, strict=True))
    for i, why in alone.items():
        own = Named(names[i], report)
        if len(configs) > 1:
            own.say(_("trained separately: {why}", why=why))
        try:
            results[i] = train(configs[i], own, resume and _is_started(configs[i]), overwrite)
        except TrainingError as error:
            results[i] = error
    failed = [f"{names[i]}: {error}" for i, error in sorted(results.items()) if isinstance(error, LorasmithError)]
    if failed:
        raise TrainingError(*failed)
    return [one for _i, one in sorted(results.items()) if isinstance(one, Summary)]


def train_each(
    config: Config, report: Report | None = None, resume: bool = False, overwrite: bool = False
) -> dict[str, Summary]:
    """Train an adapter for each name in data.data, which has the form NAME=FILE: RUN/NAME is the run of NAME.

    RUN/adapters.toml has the options of all, with which --resume continues them.

    Raises as `train_all` does, ConfigError without names, and RunError if the output folder is a single run.
    """
    named = files_by_name(config.data.data)
    if not named:
        raise ConfigError(_("data.data: the files have no adapters' names. Write NAME=FILE, without spaces in NAME."))
    folder = Path(config.output or Path("runs") / f"{'-'.join([*named][:3])}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = folder.expanduser()
    if is_run(folder):
        raise RunError(
            _("{folder} is the run of one adapter, so it cannot hold several. Choose another --output.", folder=folder)
        )
    configs = [*configs_by_name(config, folder).values()]
    if resume and not any(_is_started(one) for one in configs):
        raise RunError(_("{folder}: there is no run of any of these adapters to resume.", folder=folder))
    if not resume:
        absolute = [with_absolute_paths(one).data.data for one in configs]
        words = tuple(f"{name}={file}" for name, files in zip(named, absolute, strict=True) for file in files)
        whole = with_absolute_paths(config)
        whole = whole.model_copy(
            update={"data": whole.data.model_copy(update={"data": words}), "output": str(folder.absolute())}
        )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / GROUP_CONFIG, _as_given(whole))
    return dict(zip(named, train_all(configs, report, resume, overwrite), strict=True))


def _as_given(config: Config) -> str:
    """The options as TOML, without the learning rate if none is given: it depends on the base model."""
    text = to_toml(config, {})
    given = "learning_rate" in config.training.model_fields_set
    return text if given else re.sub(r"^learning_rate = .*\n", "", text, flags=re.MULTILINE)


class Named(Report):
    """Puts the name of an adapter before everything that is reported about it."""

    def __init__(self, name: str, report: Report) -> None:
        self.name, self.report = name, report

    def say(self, text: str) -> None:
        """Forward the message."""
        self.report.say(f"{self.name}: {text}")

    def warn(self, text: str) -> None:
        """Forward the warning."""
        self.report.warn(f"{self.name}: {text}")

    def progress(self, task: str, done: int, total: int, **numbers: float) -> None:
        """Forward the progress."""
        self.report.progress(f"{self.name}: {task}", done, total, **numbers)


class Group:
    """Runs that share a base model. reports: of each run; load and measures: as in `runs.train.train`."""

    def __init__(
        self, configs: Sequence[Config], reports: Sequence[Report], report: Report,
        load: LoadBase | None = None, measures: Sequence[Measure] | None = None,
    ) -> None:  # fmt: skip
        self.configs, self.reports, self.report, self.load = configs, reports, report, load
        self.measures: Sequence[Measure | None] = measures or [None] * len(configs)

    def train(self, resume: bool, overwrite: bool) -> list[Summary | LorasmithError]:
        """The result of each run, in order. Raises LorasmithError before any is opened, Interrupted."""
        started, world = time.perf_counter(), join()
        with ExitStack() as stack:
            runs: list[Training] = []
            results: dict[int, Summary | LorasmithError] = {}
            for i, (config, report) in enumerate(zip(self.configs, self.reports, strict=True)):
                folder, goes_on = choose_folder(config, world), resume and _is_started(config)
                stack.enter_context(run_lock(folder, world, report, goes_on))
                config = check_folder(folder, config, goes_on, overwrite)
                finished = read_summary(folder) if goes_on else None
                if finished is not None:
                    report.say(_("{run} has already finished: {summary}", run=folder, summary=finished))
                    results[i] = finished
                    continue
                runs.append(Training(config, folder, report, world, overwrite, self.load, self.measures[i]))
                runs[-1].resume = goes_on
            waiting = [i for i in range(len(self.configs)) if i not in results]
            if runs:
                stack.enter_context(resumable(_common_folder(run.folder for run in runs)))
                self._prepare(runs, started)
                results |= dict(zip(waiting, self._run(runs), strict=True))
            return [results[i] for i in range(len(self.configs))]

    def _prepare(self, runs: Sequence[Training], started: float) -> None:
        """Load the base, add all adapters, then open the run folders. Raises LorasmithError before any is opened."""
        base: Base | None = None
        fast: list[frozenset[str]] = []
        problems: list[str] = []
        for i, run in enumerate(runs):
            try:
                if base is not None:
                    run.load = partial(_already, base)
                run.prepare(run.resume, started, f"adapter-{i}")
            except LorasmithError as error:
                problems += [f"{run.report.name}: {text}" if isinstance(run.report, Named) else text
                             for text in error.problems]  # fmt: skip
                if base is None:
                    raise
            else:
                base = run.job.base
                fast.append(base.fast_parts)
        if problems:
            raise TrainingError(*problems)
        assert base is not None
        use_fast_parts(base, frozenset.intersection(*fast))
        for run in runs:
            run.open()

    def _run(self, runs: Sequence[Training]) -> list[Summary | LorasmithError]:
        base_losses: dict[str, ExampleLosses | None] = {}
        with ExitStack() as stack:
            for run in runs:
                stack.enter_context(run.job.history)
                own = run.job.origin.settings
                rows = own["held_out_sha256"] + own["template_sha256"]
                run.begin(base_losses.get(rows))
                base_losses[rows] = run.before
            if any(run.recompute for run in runs):
                recompute_activations(runs[0].job.base)
            return [_finished(run, error) for run, error in zip(runs, self._steps(runs), strict=True)]

    def _steps(self, runs: Sequence[Training]) -> list[LorasmithError | None]:
        """All steps of all runs: at once if that gives each the same result, else one run after the other."""
        pairs = [(run.job, run.state) for run in runs]
        why = not_at_once([run.job for run in runs]) if len(runs) > 1 else ""
        if why:
            text = _("The adapters are trained one after the other, over one base model: {why}", why=why)
            self.report.warn(text)
            return [error for pair in pairs for error in loop.train_together([pair])]
        if len(runs) > 1:
            count = counted(len(runs), _("1 adapter"), _("{count} adapters"))
            self.report.say(_("Training {adapters} at once", adapters=count))
        return loop.train_together(pairs)


def _already(base: Base, _config: ModelConfig, _report: Report) -> Base:
    return base


def _finished(run: Training, error: LorasmithError | None) -> Summary | LorasmithError:
    if error is not None:
        return error
    try:
        return run.finish()
    except LorasmithError as failed:
        return failed


def _is_started(config: Config) -> bool:
    return config.output is not None and is_run(Path(config.output).expanduser())


def _names(configs: Sequence[Config]) -> list[str]:
    """What to call each run: the name of its folder, or its whole path if that is not unique."""
    paths = [config.output or str(i) for i, config in enumerate(configs, 1)]
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _common_folder(folders: Iterable[Path]) -> Path:
    """The folder in which all these are."""
    paths = [str(folder.absolute()) for folder in folders]
    return Path(commonpath(paths)) if len(paths) > 1 else Path(paths[0]).parent
