"""From a configuration to a job that is ready to run: base model, examples, adapter, plan. For train and check."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from lorasmith.adapters.folder import end_ids
from lorasmith.config.model import ModelConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.config.toml import Config
from lorasmith.config.training import MAX_STEPS
from lorasmith.data.dataset.plan import Plan, plan
from lorasmith.data.dataset.prepare import Prepared, prepare
from lorasmith.data.read.files import DataFile
from lorasmith.data.template.encoding import Template
from lorasmith.data.template.variables import check_variables
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.evaluation.custom_metric import custom_metrics
from lorasmith.evaluation.generation import GenerationEvaluation
from lorasmith.evaluation.metrics import Metric, require_eval_extra
from lorasmith.i18n import _, listed
from lorasmith.loading.load import load_base
from lorasmith.lora.files import read_weights
from lorasmith.lora.inject import Adapter, inject
from lorasmith.lora.quantized import count_parameters
from lorasmith.lora.saved_values import restore_values
from lorasmith.lora.start_values import computed_from_weight
from lorasmith.model.base import Base
from lorasmith.model.forward import shares_prefixes
from lorasmith.model.row import Example, laid_length
from lorasmith.model.verify import enable_fast_parts
from lorasmith.model.vocabulary import add_tokens, refuse_surplus_examples, unused_tokens
from lorasmith.report import Report
from lorasmith.system.device import dtype_name
from lorasmith.training.artifact import artifact_of
from lorasmith.training.checkpoint import Origin
from lorasmith.training.distributed import World
from lorasmith.training.eva import start_eva
from lorasmith.training.evaluator import Evaluator, Samples
from lorasmith.training.full import leave_out_unreached, whole_model
from lorasmith.training.history import History
from lorasmith.training.invocation import check_invocation
from lorasmith.training.loftq import refuse_without_error, start_loftq
from lorasmith.training.loop import Job
from lorasmith.training.memory import affordable_tokens
from lorasmith.training.optim import FlatParameters
from lorasmith.training.optimizers import in_groups, make_optimizer, require_optimizer
from lorasmith.training.preference import Preference
from lorasmith.training.run_folder import with_absolute_paths
from lorasmith.training.start_from import (
    check_encoding,
    continued,
    load_checkpoint,
    load_start,
    read_start,
    start_notes,
)
from lorasmith.training.trackers import require_trackers

LoadBase = Callable[[ModelConfig, Report], Base]
ADAPTER = "default"
# Options of [training] that do not affect the adapter, so a resumed run may change them.
NO_EFFECT_ON_ADAPTER = {"log_every", "save_every", "keep_checkpoints", "samples", "metric", "tensorboard", "report_to"}


@dataclass(frozen=True)
class Assembled:
    """A job before its first step, with the template and the data that it was made from.

    config: with the base model and the LoRA options of the adapter that it starts from, if there is one, and with the
    learning rate that is usual for the base model, if none is given.
    """

    job: Job
    config: Config
    template: Template
    data: Prepared


def assemble(
    config: Config, folder: Path, report: Report, world: World,
    files: Sequence[DataFile] | None = None, saved: Path | None = None, load: LoadBase | None = None,
    name: str = ADAPTER,
) -> Assembled:  # fmt: skip
    """Load the base model, encode the examples and add the adapter. Writes nothing into the run's `folder`.

    files: the data files, if they have already been read. saved: the checkpoint from which the run is resumed. It has
    everything of the adapter that training.start_from names, which may have been removed since. load: gives the base
    model, whose modules the training then changes. name: the adapter's.

    Raises LorasmithError, which reports problems of the data and of the adapter's target patterns together.
    """
    custom = custom_metrics(config.training.metric)
    require_trackers(config.training.trackers)
    require_optimizer(config.training.optimizer)
    if config.training.generate:
        require_eval_extra()
    continues, given = config.training.start_from is not None, config.lora
    start = read_start(config) if saved is None else None
    if start is not None:
        config = continued(config, start, report)
    elif "model" not in config.model.model_fields_set:
        report.say(_default_model(config))
    base = (load or load_base)(config.model, report)
    training = config.training.with_usual_rate(count_parameters(base.model))
    config = config.model_copy(update={"training": training})
    if config.data.add_tokens:
        add_tokens(base, config.data.add_tokens)
        report.say(_added(base))

    def rows() -> tuple[Template, Prepared]:
        template = Template.from_config(base.tokenizer, config.data, end_ids(base))
        check_variables(template, config.data.template_kwargs)
        if start is not None:
            check_encoding(start, base, template, report)
        return template, prepare(
            config.data, template, base.max_positions, report, config.training.seed, files, affordable_tokens(base),
            config.training.method,
        )  # fmt: skip

    def adapter() -> Adapter:
        if start is not None:
            return load_start(base, start, given, name)
        if continues and saved is not None:
            return load_checkpoint(base, saved, name)
        return _new_adapter(base, config, saved, name)

    (template, data), base.adapters[name] = together(rows, adapter)
    refuse_surplus_examples(base, [*data.train, *data.held_out])
    if text := unused_tokens(base, data.train):
        report.warn(text)
    check_invocation(data.train, base.adapters[name].config, report)
    if start is None and saved is None:
        start_eva(base, name, data.train, config, report)
        start_loftq(base, name, config, report)
    first = [token for example in data.train[:16] for token in example.ids]
    leave_out_unreached(base, name, first, report)
    enable_fast_parts(base, name, first)
    notes = start_notes(start, saved) if continues else {}
    job = _job(config, base, template, data, custom, folder, report, world, notes, name)
    return Assembled(job, config, template, data)


def _new_adapter(base: Base, config: Config, saved: Path | None, name: str) -> Adapter:
    """A new adapter, or all weights; if the start of A and B is computed from the weights, that in the checkpoint."""
    if config.training.method == "full":
        return whole_model(base, name, config.training)
    refuse_without_error(base, config.lora)
    resumes = saved is not None and computed_from_weight(config.lora)
    adapter = inject(base.model, config.lora, base.router, name, config.training.seed,
                     tokens=tuple(base.added_tokens.values()), start=not resumes)  # fmt: skip
    if saved is not None and resumes:
        restore_values(adapter, base.model, read_weights(saved))
    return adapter


def _default_model(config: Config) -> str:
    return _(
        "No base model given; using {model}, as in the demo: a small model, mainly for English. Choose "
        "another one with --model.",
        model=config.model.model,
    )


def _added(base: Base) -> str:
    tokens = [f"{token!r} ({i})" for token, i in base.added_tokens.items()]
    return _("Added to the vocabulary, with their ids: {tokens}", tokens=listed(tokens))


def together(*parts: Callable[[], Any]) -> list[Any]:
    """The result of each part. All parts are called, so that one LorasmithError can report the problems of all."""
    results, errors = list[Any](), list[LorasmithError]()
    for part in parts:
        try:
            results.append(part())
        except LorasmithError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise LorasmithError(*(problem for error in errors for problem in error.problems))
    return results


def recompute_activations(base: Base) -> None:
    """Enable gradient checkpointing, under the name that the installed transformers has for it."""
    new = getattr(base.model, "activation_checkpointing_enable", None)
    (new or base.model.gradient_checkpointing_enable)({"use_reentrant": False})


def _job(
    config: Config,
    base: Base,
    template: Template,
    data: Prepared,
    custom: Sequence[Metric],
    folder: Path,
    report: Report,
    world: World,
    notes: dict[str, Any],
    name: str,
) -> Job:
    parameters = FlatParameters(in_groups(base.adapters[name].trained, config.training))
    notes = notes | {
        "data": list(with_absolute_paths(config).data.data),
        "max_length": data.max_length,
        "dtype": dtype_name(base.dtype),
        **_quantized(base),
    }

    artifact = artifact_of(base, name, template, notes, config.model.trust_remote_code)
    history = History(folder, config.training.trackers, report)
    preference = Preference.of(config, data.train, data.held_out, data.max_length)
    train = preference.train if preference else data.train
    made = _plan(config, base, train, name, preference.loss.unit if preference else 1)
    if preference:
        preference.follow(made)
    return Job(
        base=base,
        adapter=name,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.training),
        plan=made,
        train=train,
        config=config.training,
        world=world,
        folder=folder,
        history=history,
        evaluator=Evaluator(
            base=base,
            adapter=name,
            examples=preference.held_out if preference else data.held_out,
            preference=preference,
            generation=_generation_evaluation(config, template, data, custom),
            samples=Samples.of(base, template, config.training.samples),
            history=history,
            folder=folder,
            artifact=artifact,
            world=world,
            report=report,
        ),
        origin=Origin(_settings(base, template, data, world, notes), _options(config)),
        artifact=artifact,
        report=report,
        preference=preference,
    )


def _generation_evaluation(
    config: Config, template: Template, data: Prepared, custom: Sequence[Metric]
) -> GenerationEvaluation | None:
    """The evaluation that training.generate asks for; None if it is 0 or nothing is held out."""
    count, sampling = config.training.generate, SamplingConfig(max_new_tokens=config.training.max_new_tokens)
    if not count or not data.held_out:
        return None
    good = [example for example in data.held_out if example.desirable is not False]
    return GenerationEvaluation.from_examples(good, template, count, sampling, custom)


def _plan(config: Config, base: Base, train: Sequence[Example], name: str, unit: int) -> Plan:
    """The plan, of which each unit is so many consecutive examples."""
    units = [train[i : i + unit] for i in range(0, len(train), unit)]
    share = unit > 1 and shares_prefixes(base, name)
    lengths = [laid_length(examples, share) for examples in units]
    n_targets = [sum(example.n_targets for example in examples) for examples in units]
    made = plan(lengths, n_targets, config.training, config.training.seed, base.layout)
    if len(made) > MAX_STEPS:
        raise ConfigError(
            _(
                "training.epochs: {epochs:g} epochs are {steps:,} steps, but a run can have at most {most:,}. "
                "Use fewer epochs, or a larger training.batch_size.",
                epochs=config.training.epochs,
                steps=len(made),
                most=MAX_STEPS,
            )
        )
    return made


def _settings(base: Base, template: Template, data: Prepared, world: World, notes: dict[str, Any]) -> dict[str, str]:
    """Everything besides options that must not change for a resumed run to be bit for bit the same."""
    started = {"start_sha256": notes["start_from"]["sha256"]} if "start_from" in notes else {}
    texts = json.dumps([template.text, template.tool_text, template.stop_ids])
    return {f"base_{part}": value for part, value in base.identity.items()} | {
        "dtype": dtype_name(base.dtype),
        **_quantized(base),
        "device": str(base.device),
        "layout": base.layout,
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": str(world.size),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "train_sha256": data.train_sha256,
        "held_out_sha256": data.held_out_sha256,
        "template_sha256": sha256(texts.encode()).hexdigest(),
        **started,
    }


def _quantized(base: Base) -> dict[str, str]:
    return {"quantize": base.quantize} if base.quantize != "none" else {}


def _options(config: Config) -> dict[str, str]:
    """The options that affect the adapter, besides those of the base model and the data; values as JSON."""
    config = with_absolute_paths(config)
    sections = {"lora": config.lora, "training": config.training, "preference": config.preference}
    parts = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return {
        f"{part}.{key}": json.dumps(value, ensure_ascii=False)
        for part, values in parts.items()
        for key, value in values.items()
        if key not in NO_EFFECT_ON_ADAPTER
    }
