"""Trained adapters against their base on held-out examples: loss, answers, and what was forgotten."""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import Config, load_config
from lorasmith.data.dataset.prepare import prepare
from lorasmith.errors import AdapterError, ConfigError, DataError, RunError
from lorasmith.evaluation.custom_metric import own_metrics
from lorasmith.evaluation.general_text import NAME as GENERAL
from lorasmith.evaluation.general_text import general_examples
from lorasmith.evaluation.generation import Quiz
from lorasmith.evaluation.loss import HeldOut, compare, held_out
from lorasmith.evaluation.metrics import Metric, Scored, compare_scores, require_extra
from lorasmith.evaluation.results import Evaluation, Forgotten, Measured, Sample
from lorasmith.i18n import _
from lorasmith.lora.inject import HALF
from lorasmith.model.row import Example
from lorasmith.model.verify import speed_up
from lorasmith.report import Report, Warnings
from lorasmith.runs.leakage import seen_in_training
from lorasmith.training.run_folder import CONFIG, ENVIRONMENT


@dataclass(frozen=True)
class Wanted:
    """What to measure beside the loss.

    files: examples of the user's own, all of them measured, and `limits` says how long; without, the ones held out.
    answers: to how many of them base and adapters reply; `sampling` how; `metrics` of the user's own ('my.py:score').
    forget: a file on which to see what was forgotten; "": the general text that the package carries; None: neither.
    """

    files: tuple[str, ...] = ()
    limits: DataConfig | None = None
    answers: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    metrics: tuple[str, ...] = ()
    forget: str | None = None


def evaluate(
    paths: Sequence[str | Path],
    wanted: Wanted | None = None,
    model: ModelConfig | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Base and adapters on the same examples, paired: with the seed of the first run's training, as in its summary.

    Raises:
        ConfigError: limits without files, or a metric of the user's own that cannot be used.
        MissingExtraError: answers are wanted, and what compares them is not installed.
        DataError: no files are given and the run held nothing out; or what `prepare` raises.
        RunError: the run's data changed since its training, or the runs held out different examples.
        AdapterError, ModelError: see `open_adapters`; also an adapter that changes no loss.
    """
    report, wanted = report or Report(), wanted or Wanted()
    runs = [Path(path).expanduser() for path in paths]
    own = _checked(wanted)
    session = open_adapters(runs, model, report)
    config = load_config(runs[0] / CONFIG, {}) if _is_run(runs[0]) else None
    seed = config.training.seed if config else 0
    if wanted.files:
        examples = _of_files(session, wanted.files, wanted.limits or DataConfig(), report)
        for text in seen_in_training(session, examples, report):
            report.warn(text)
    else:
        examples = _of_runs(session, runs, config, report)
    if session.base.dtype in HALF:  # run as its training ran it: other kernels give another fourth digit
        speed_up(session.base, session.names[0], [token for example in examples[:16] for token in example.ids])
    others = _of_another_text(session, wanted.forget, report)
    quiz = Quiz.of(examples, session.template, wanted.answers, wanted.sampling, own) if wanted.answers else None
    losses = [compare(*pair, seed) for pair in _losses(session, examples, _("held-out loss"), report)]
    forgotten = _forgotten(session, others, seed, report)
    samples = _samples(session, quiz, report)
    scores = _scores(samples, quiz, len(losses), seed)
    names, folders = session.names, [str(folder.path) for folder in session.folders.values()]
    return Evaluation(
        base=session.base.source,
        data=wanted.files or _own_files(config),
        forget_data=wanted.forget if wanted.forget != "" else GENERAL,
        adapters=tuple(map(Measured, names, folders, losses, scores, forgotten)),
        samples=samples,
    )


def _checked(wanted: Wanted) -> list[Metric]:
    """The user's own metrics, and everything that can be refused before a model is loaded."""
    problems = []
    if wanted.limits is not None and not wanted.files:
        problems.append(
            _(
                "data.map, data.max_length and data.too_long only apply to files that you give: the run's "
                "held-out examples are encoded as in training. Remove these options, or give a file: lorasmith "
                "eval RUN FILE"
            )
        )
    if wanted.metrics and not wanted.answers:
        problems.append(
            _("--metric scores generated answers, but none are requested. Request some, for example with --generate 50")
        )
    own = list[Metric]()
    try:
        own = own_metrics(wanted.metrics)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    if wanted.answers:
        require_extra()
    return own


def _losses(session: Session, examples: Sequence[Example], what: str, report: Report) -> list[tuple[HeldOut, HeldOut]]:
    """(base, adapter) for each adapter. Raises AdapterError for one that changes no loss by a single bit."""
    before = held_out(session.base, examples, None, report, _("{what} of the base model", what=what))
    pairs = []
    for name, folder in session.folders.items():
        of = _("the adapter") if len(session.folders) == 1 else name
        after = held_out(session.base, examples, name, report, _("{what} of {name}", what=what, name=of))
        if torch.equal(before.losses, after.losses):
            raise AdapterError(
                _(
                    "{folder}: this adapter has no effect: on all {examples} examples its loss is bit-for-bit "
                    "equal to the base model's. Check that it was trained and that its lora_alpha is above 0.",
                    folder=folder.path,
                    examples=len(examples),
                )
            )
        pairs.append((before, after))
    return pairs


def _of_another_text(session: Session, forget: str | None, report: Report) -> list[Example]:
    """What to see on what was forgotten; nothing where that is not asked."""
    if forget is None:
        return []
    if not forget:
        return general_examples(session.base.tokenizer, session.base.max_positions)
    return _of_files(session, [forget], DataConfig(too_long="truncate"), report)


def _forgotten(
    session: Session, examples: Sequence[Example], seed: int, report: Report
) -> list[Forgotten] | list[None]:
    if not examples:
        return [None] * len(session.folders)
    pairs = _losses(session, examples, _("forgetting-check loss"), report)
    return [Forgotten(*astuple(compare(*pair, seed))) for pair in pairs]


def _samples(session: Session, quiz: Quiz | None, report: Report) -> tuple[Sample, ...]:
    """Replies of the base and of every adapter to the same questions."""
    if quiz is None:
        return ()
    replies = []
    for name in (None, *session.names):
        task = _("answers of {name}", name=_("the base model") if name is None else name)
        replies.append(quiz.answers(session.base, name, report, task))
    rows = zip(quiz.questions, *replies, strict=True)
    return tuple(Sample(q.text, q.reference, q.source, base, tuple(rest)) for q, base, *rest in rows)


def _scores(samples: Sequence[Sample], quiz: Quiz | None, adapters: int, seed: int) -> list[tuple[Scored, ...]]:
    """For each adapter, every metric."""
    if quiz is None:
        return [()] * adapters
    columns = list(zip(*(sample.answers for sample in samples), strict=True))
    found = []
    for metric in quiz.metrics:
        before, *after = [quiz.numbers(metric, column) for column in columns]
        found.append([compare_scores(metric, before, other, seed) for other in after])
    return list(zip(*found, strict=True))


def _own_files(config: Config | None) -> tuple[str, ...]:
    """Where the examples that a run held out come from."""
    if config is None:
        return ()
    share = config.data.held_out
    return (share,) if isinstance(share, str) else config.data.data


def _of_files(session: Session, files: Sequence[str], limits: DataConfig, report: Report) -> list[Example]:
    config = limits.model_copy(update={"data": tuple(files), "held_out": 0.0})
    return prepare(config, session.template, session.base.max_positions, Warnings(report)).train


def _of_runs(session: Session, runs: Sequence[Path], config: Config | None, report: Report) -> list[Example]:
    """What the first run held out. Raises RunError where another one held out something else, and so may know it."""
    found = _of_run(session, runs[0], config, report)
    first = _environment(runs[0]).get("held_out_sha256")
    others = [run for run in runs[1:] if not _is_run(run) or _environment(run).get("held_out_sha256") != first]
    if others:
        raise RunError(
            *(
                _(
                    "{run}: its held-out examples differ from those of {first}, so it may have been trained on "
                    "the examples that {first} is evaluated on. Give a file that no run was trained on: "
                    "lorasmith eval RUN RUN FILE",
                    run=run,
                    first=runs[0],
                )
                for run in others
            )
        )
    return found


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file()


def _of_run(session: Session, run: Path, config: Config | None, report: Report) -> list[Example]:
    """The run's held-out examples, drawn again from its files and proved to be the same."""
    if config is None:
        raise DataError(
            _(
                "{run}: not a run folder, so it records no held-out examples. Give a file: lorasmith eval RUN FILE",
                run=run,
            )
        )
    then = _environment(run)
    now = prepare(config.data, session.template, session.base.max_positions, Warnings(report), config.training.seed)
    if then.get("held_out_sha256") != now.held_out_sha256:
        raise RunError(
            _(
                "{run}: the data has changed since training ({files}), so the held-out examples cannot be "
                "reconstructed. Restore the original files, or give another one: lorasmith eval RUN FILE",
                run=run,
                files=", ".join(config.data.data),
            )
        )
    if not now.held_out:
        raise DataError(_("{run}: this run held out no examples. Give a file: lorasmith eval RUN FILE", run=run))
    return now.held_out


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            _(
                "{path}: cannot be read ({error}), but it records which examples were held out. Give a file: "
                "lorasmith eval RUN FILE",
                path=path,
                error=error,
            )
        ) from None
    return found if isinstance(found, dict) else {}
