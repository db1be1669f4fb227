"""Evaluate trained adapters against their base model on held-out examples: loss, generated answers, forgetting."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorasmith.adapters.session import Session, open_adapters
from lorasmith.config.data import DataConfig
from lorasmith.config.files import parse_json
from lorasmith.config.model import ModelConfig
from lorasmith.config.preference import METHODS
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import Config, load_config
from lorasmith.data.dataset.prepare import Prepared, prepare
from lorasmith.errors import AdapterError, ConfigError, DataError, RunError
from lorasmith.evaluation.custom_metric import custom_metrics
from lorasmith.evaluation.general_text import GENERAL_TEXT, general_examples
from lorasmith.evaluation.generation import GenerationEvaluation
from lorasmith.evaluation.loss import Comparison, ExampleLosses, compare, evaluate_loss
from lorasmith.evaluation.metrics import Metric, MetricComparison, compare_metric, require_eval_extra
from lorasmith.evaluation.results import AdapterEvaluation, ComparedAnswers, Evaluation, Forgetting
from lorasmith.i18n import _, listed
from lorasmith.loading.load import load_base
from lorasmith.lora.biases import HALF_PRECISION
from lorasmith.model.base import Base
from lorasmith.model.row import Example
from lorasmith.model.verify import enable_fast_parts
from lorasmith.model.vocabulary import refuse_surplus_examples
from lorasmith.report import Report, WarningsOnly
from lorasmith.runs.leakage import leakage_warnings
from lorasmith.runs.preferences import preference_comparisons
from lorasmith.system.device import dtype_name
from lorasmith.training.run_files import ENVIRONMENT, RUN_CONFIG


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and on which examples.

    files: evaluate on all rows of these files; by default, on the examples that the run held out.
    limits: how rows of `files` are read and truncated.
    answers: number of examples for which answers are generated and scored, with `sampling`.
    metrics: custom metrics for the answers ('my.py:score').
    forget: a file on which to evaluate forgetting; "" for the general text of this package; None for neither.
    """

    files: tuple[str, ...] = ()
    limits: DataConfig | None = None
    answers: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    metrics: tuple[str, ...] = ()
    forget: str | None = None


def evaluate(
    paths: Sequence[str | Path],
    options: EvaluationOptions | None = None,
    model: ModelConfig | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Evaluate the adapters in `paths` (run or adapter folders) and their base model on the same examples.

    The bootstrap uses the seed of the first run's training, so the intervals are those of the run's summary. A run
    on preferences is evaluated by its loss, beside the model as it stood at its start.

    Raises:
        ConfigError: limits without files, or a custom metric that cannot be used.
        MissingExtraError: answers are to be scored, and the packages for it are not installed.
        DataError: no files are given and the run held nothing out; or see `prepare`.
        RunError: the run's data changed since its training, or the runs held out different examples.
        AdapterError, ModelError: see `open_adapters`; also an adapter that changes no loss.
    """
    report, options = report or Report(), options or EvaluationOptions()
    runs = [Path(path).expanduser() for path in paths]
    custom = _checked(options)
    session = open_adapters(runs, model, report)
    config = load_config(runs[0] / RUN_CONFIG, {}) if _is_run_folder(runs[0]) else None
    seed = config.training.seed if config else 0
    if options.files:
        examples = read_examples(session, options.files, options.limits or DataConfig(), report)
        for text in leakage_warnings(session, examples, report):
            report.warn(text)
    else:
        examples = _held_out_by_all(session, runs, config, report)
    forgetting_examples = _forgetting_examples(session, options.forget, report)
    refuse_surplus_examples(session.base, [*examples, *forgetting_examples])
    systems = _systems(session, model, report)
    if (
        session.base.dtype in HALF_PRECISION and session.names
    ):  # the kernels of its training: others would change the fourth digit of the loss
        enable_fast_parts(session.base, session.names[0], [token for example in examples[:16] for token in example.ids])
    generation = None
    if options.answers:
        good = [example for example in examples if example.desirable is not False]
        generation = GenerationEvaluation.from_examples(
            good, session.template, options.answers, options.sampling, custom
        )
    losses: list[Comparison]
    if not options.files and config is not None and config.training.method in METHODS:
        losses = list(preference_comparisons(session, runs[0], config, examples, report))
    else:
        losses = [compare(*pair, seed) for pair in _evaluate_losses(systems, examples, _("held-out loss"), report)]
    forgotten = _evaluate_forgetting(systems, forgetting_examples, seed, report)
    samples = _compare_answers(systems, generation, report)
    scores = _compare_metrics(samples, generation, len(losses), seed)
    return Evaluation(
        base=systems[0].base.source,
        data=options.files or _held_out_files(config),
        forget_data=options.forget if options.forget != "" else GENERAL_TEXT,
        adapters=tuple(
            AdapterEvaluation(system.name, str(system.folder), loss, score, lost)
            for system, loss, score, lost in zip(systems[1:], losses, scores, forgotten, strict=True)
        ),
        samples=samples,
    )


def _checked(options: EvaluationOptions) -> list[Metric]:
    """The custom metrics. Raises for every option that is wrong, before a model is loaded."""
    problems = []
    if options.limits is not None and not options.files:
        problems.append(
            _(
                "data.map, data.fill, data.roles, data.skip_bad_rows, data.max_length and data.too_long only apply to "
                "files that you give: the run's held-out examples are encoded as in training. Remove these options, "
                "or give a file: lorasmith eval RUN FILE"
            )
        )
    if options.metrics and not options.answers:
        problems.append(
            _("--metric scores generated answers, but none are requested. Request some, for example with --generate 50")
        )
    custom = list[Metric]()
    try:
        custom = custom_metrics(options.metrics)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    if options.answers:
        require_eval_extra()
    return custom


class _System(NamedTuple):
    """What is evaluated: a base model, alone or with an adapter. folder: of the adapter, or of the trained model."""

    name: str
    base: Base
    adapter: str | None = None
    folder: Path = Path()


def _systems(session: Session, model: ModelConfig | None, report: Report) -> list[_System]:
    """The base model, and what was trained: the adapters, or a model all of whose weights were."""
    if session.model is None:
        trained = [_System(name, session.base, name, folder.path) for name, folder in session.folders.items()]
        return [_System(_("the base model"), session.base), *trained]
    name, original = session.model.absolute().parent.name, original_of(session, model, report)
    return [_System(_("the base model"), original), _System(name, session.base, folder=session.model)]


def original_of(session: Session, model: ModelConfig | None, report: Report) -> Base:
    """The model that the trained model of `session` was before its run, loaded beside it, in eval mode.

    Both need memory then. Raises ModelError if it cannot be loaded.
    """
    assert session.model is not None
    config = load_config(session.model.absolute().parent / RUN_CONFIG, {}).model
    given = (model or ModelConfig()).model_dump(exclude_unset=True)
    original = load_base(config.model_copy(update={"dtype": dtype_name(session.base.dtype)} | given), report)
    original.model.eval()
    return original


def _evaluate_losses(
    systems: Sequence[_System], examples: Sequence[Example], what: str, report: Report
) -> list[tuple[ExampleLosses, ExampleLosses]]:
    """(base model, trained) for all but the first. Raises AdapterError for one that changes no bit of any loss."""
    before = evaluate_loss(systems[0].base, examples, None, report, _("{what} of the base model", what=what))
    pairs = []
    for name, base, adapter, folder in systems[1:]:
        of = _("the adapter") if len(systems) == 2 and adapter else name
        after = evaluate_loss(base, examples, adapter, report, _("{what} of {name}", what=what, name=of))
        if torch.equal(before.losses, after.losses):
            raise AdapterError(
                _(
                    "{folder}: this adapter has no effect: on all {examples} examples its loss is bit-for-bit "
                    "equal to the base model's. Check that it was trained and that its lora_alpha is above 0.",
                    folder=folder,
                    examples=len(examples),
                )
            )
        pairs.append((before, after))
    return pairs


def _forgetting_examples(session: Session, forget: str | None, report: Report) -> list[Example]:
    """The examples on which to evaluate forgetting; empty if it is not to be evaluated."""
    if forget is None:
        return []
    if not forget:
        return general_examples(session.base.tokenizer, session.base.max_positions)
    return read_examples(session, [forget], DataConfig(too_long="truncate"), report)


def _evaluate_forgetting(
    systems: Sequence[_System], examples: Sequence[Example], seed: int, report: Report
) -> list[Forgetting] | list[None]:
    if not examples:
        return [None] * (len(systems) - 1)
    pairs = _evaluate_losses(systems, examples, _("forgetting-check loss"), report)
    return [Forgetting(*astuple(compare(*pair, seed))) for pair in pairs]


def _compare_answers(
    systems: Sequence[_System], generation: GenerationEvaluation | None, report: Report
) -> tuple[ComparedAnswers, ...]:
    """The answers of the base model and of every adapter to the same prompts."""
    if generation is None:
        return ()
    answers = []
    for system in systems:
        task = _("answers of {name}", name=system.name)
        answers.append(generation.generate(system.base, system.adapter, report, task))
    rows = zip(generation.prompts, *answers, strict=True)
    return tuple(ComparedAnswers(p.text, p.reference, p.source, base, tuple(rest)) for p, base, *rest in rows)


def _compare_metrics(
    samples: Sequence[ComparedAnswers], generation: GenerationEvaluation | None, adapters: int, seed: int
) -> list[tuple[MetricComparison, ...]]:
    """For each adapter, its comparison with the base model under every metric."""
    if generation is None:
        return [()] * adapters
    systems = list(zip(*(sample.answers for sample in samples), strict=True))
    by_metric = []
    for metric in generation.metrics:
        before, *after = [generation.statistics(metric, answers) for answers in systems]
        by_metric.append([compare_metric(metric, before, other, seed) for other in after])
    return list(zip(*by_metric, strict=True))


def _held_out_files(config: Config | None) -> tuple[str, ...]:
    """The files that a run's held-out examples come from."""
    if config is None:
        return ()
    share = config.data.held_out
    return (share,) if isinstance(share, str) else config.data.data


def read_examples(session: Session, files: Sequence[str], limits: DataConfig, report: Report) -> list[Example]:
    """All rows of `files`, encoded with the template of the adapters."""
    config = limits.model_copy(update={"data": tuple(files), "held_out": 0.0})
    return prepare(config, session.template, session.base.max_positions, WarningsOnly(report)).train


def _held_out_by_all(session: Session, runs: Sequence[Path], config: Config | None, report: Report) -> list[Example]:
    """The examples that the first run held out.

    Raises RunError if another run held out different ones: it may have been trained on these.
    """
    examples = _held_out_by(session, runs[0], config, report)
    first = _environment(runs[0]).get("held_out_sha256")
    others = [run for run in runs[1:] if not _is_run_folder(run) or _environment(run).get("held_out_sha256") != first]
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
    return examples


def _is_run_folder(path: Path) -> bool:
    return (path / RUN_CONFIG).is_file()


def _held_out_by(session: Session, run: Path, config: Config | None, report: Report) -> list[Example]:
    """The run's held-out examples, read again from its files and checked by their fingerprint."""
    if config is None:
        raise DataError(
            _(
                "{run}: not a run folder, so it records no held-out examples. Give a file: lorasmith eval RUN FILE",
                run=run,
            )
        )
    now = prepared_again(session, run, config, report)
    if not now.held_out:
        raise DataError(_("{run}: this run held out no examples. Give a file: lorasmith eval RUN FILE", run=run))
    return now.held_out


def prepared_again(session: Session, run: Path, config: Config, report: Report) -> Prepared:
    """A run's examples, read again from its files. Raises RunError if the held-out ones are not what they were."""
    then = _environment(run)
    now = prepare(
        config.data, session.template, session.base.max_positions, WarningsOnly(report), config.training.seed,
        method=config.training.method,
    )  # fmt: skip
    if then.get("held_out_sha256") != now.held_out_sha256:
        raise RunError(
            _(
                "{run}: the data has changed since training ({files}), so the held-out examples cannot be "
                "reconstructed. Restore the original files, or give another one: lorasmith eval RUN FILE",
                run=run,
                files=listed(config.data.data),
            )
        )
    return now


def some_held_out(session: Session, path: str | Path, report: Report, count: int = 16) -> list[Example]:
    """Up to `count` held-out examples of a run, from all over its files; none, with a warning, if the files changed."""
    run = Path(path).expanduser()
    if not _is_run_folder(run):
        return []
    try:
        found = prepared_again(session, run, load_config(run / RUN_CONFIG, {}), report).held_out
    except (DataError, RunError) as error:
        report.warn(_("held-out rows are not compared: {error}", error=error))
        return []
    found = [example for example in found if example.desirable is not False]
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    try:
        found = parse_json(path.read_bytes())
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
