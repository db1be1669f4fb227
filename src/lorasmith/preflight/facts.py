"""What is about to happen, in ten lines, with the reason of each choice; said by `check` and by every training."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.cells import cell_len
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.training import TrainingConfig
from lorasmith.data.dataset.fit import in_rows
from lorasmith.evaluation.loss import FEWEST
from lorasmith.i18n import _
from lorasmith.lora.inject import Counts, count
from lorasmith.lora.target import in_words
from lorasmith.model.base import Base
from lorasmith.preflight.estimate import Expected
from lorasmith.preflight.suggest import passes, rate_for
from lorasmith.system.device import dtype_name
from lorasmith.training.loop import Job
from lorasmith.training.optim import learning_rate, warmup_steps

LABEL = 9  # columns
HALF = 2  # bytes of a number in the file of a base
USUAL_RATE = 2e-4  # of LoRA's and QLoRA's papers; docs/decisions.md


@dataclass(frozen=True)
class Facts:
    """One training before its first step. Paths are the base's own; tokens are those of one pass."""

    model: str
    dtype: str
    device: str
    why: dict[str, str]
    layout: str
    targets: dict[str, list[str]]
    saved: dict[str, list[str]]
    without_adapter: list[str]
    trainable: int
    parameters: int
    examples: int
    held_out: int
    tokens: int
    learned_tokens: int
    steps: int
    step_examples: int
    learning_rate: float
    schedule: str
    warmup: int
    answered: int
    answer_tokens: int
    expected: Expected
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def facts_of(job: Job, expected: Expected) -> Facts:
    """What `job` will do; nothing is computed but numbers."""
    base, adapter = job.base, job.base.adapters[job.adapter]
    trainable, parameters = count(base.model, adapter)
    return Facts(
        model=base.source,
        dtype=dtype_name(base.dtype),
        device=str(base.device),
        why=base.why | {"learning_rate": _why_rate(job.config)},
        layout=base.layout,
        targets=adapter.targets.matched,
        saved=adapter.targets.saved,
        without_adapter=_without_adapter(base, job.adapter),
        trainable=trainable,
        parameters=parameters,
        examples=len(job.train),
        held_out=len(job.held_out),
        tokens=sum(job.plan.lengths),
        learned_tokens=sum(job.plan.n_targets),
        steps=len(job.plan),
        step_examples=job.plan.step_examples,
        learning_rate=job.config.learning_rate,
        schedule=job.config.schedule,
        warmup=warmup_steps(job.config, len(job.plan)),
        answered=len(job.quiz.questions) if job.quiz else 0,
        answer_tokens=job.config.max_new_tokens,
        expected=expected,
        warnings=[*_warnings(job), *expected.warnings],
        problems=[*_problems(job), *expected.problems],
    )


def said(facts: Facts) -> Iterator[str]:
    """The lines as text, their labels one under another."""
    for label, text in lines(facts):
        yield label + " " * (LABEL - cell_len(label)) + text


def lines(facts: Facts) -> Iterator[tuple[str, str]]:
    """(label, sentence), in the order in which they are read."""
    why = facts.why
    yield _("base"), _base(facts)
    yield _("layout"), why["layout"]
    yield _("fast"), _("{parts} (verified equal to the standard step)", parts=why["fast"])
    if "plain" in why:
        yield _("normal"), _("not accelerated, because results differ: {parts}", parts=why["plain"])
    for pattern, paths in facts.targets.items():
        yield _("target"), _("{pattern} matches {modules}", pattern=pattern, modules=in_words(paths))
    for name, paths in facts.saved.items():
        yield _("full"), _("{name} is copied and trained in full: {modules}", name=name, modules=", ".join(paths))
    yield _("layers"), _without(facts)
    yield _("params"), str(Counts(facts.trainable, facts.parameters))
    yield _("steps"), _steps(facts)
    yield _("rate"), _rate(facts)
    if facts.answered:
        yield _("answers"), _answers(facts)
    yield from facts.expected.lines()


def _base(facts: Facts) -> str:
    return _(
        "{model}: {dtype} on {device} ({why})",
        model=facts.model,
        dtype=facts.dtype,
        device=facts.device,
        why=facts.why["dtype"],
    )


def _without(facts: Facts) -> str:
    if not facts.without_adapter:
        return _("every linear layer has an adapter")
    return _("linear layers without an adapter: {modules}", modules=in_words(facts.without_adapter))


def _steps(facts: Facts) -> str:
    text = _(
        "{steps} steps of {examples} examples; {all:,} examples with {tokens:,} tokens per epoch, {held_out:,} "
        "held out",
        steps=facts.steps,
        examples=facts.step_examples,
        all=facts.examples,
        tokens=facts.tokens,
        held_out=facts.held_out,
    )
    few = 0 < facts.held_out < FEWEST
    return text + (_(" (fewer than {fewest}, too few to detect a difference)", fewest=FEWEST) if few else "")


def _rate(facts: Facts) -> str:
    return _(
        "learning rate {rate:g} ({schedule}, {warmup} warmup steps): {why}",
        rate=facts.learning_rate,
        schedule=facts.schedule,
        warmup=facts.warmup,
        why=facts.why["learning_rate"],
    )


def _answers(facts: Facts) -> str:
    return _(
        "replies to {rows} of the held-out set at every evaluation, up to {tokens} tokens each; not included "
        "in the estimated time",
        rows=in_rows(facts.answered),
        tokens=facts.answer_tokens,
    )


def _why_rate(config: TrainingConfig) -> str:
    if "learning_rate" not in config.model_fields_set:
        return _("the usual value for LoRA and QLoRA")
    times = config.learning_rate / USUAL_RATE
    return _("as requested: {times:.3g} times the usual {usual:g}", times=times, usual=USUAL_RATE)


def _without_adapter(base: Base, adapter: str) -> list[str]:
    """Linear layers that no pattern matched, with the base's own names."""
    found = base.adapters[adapter].targets
    taken = {*found.adapted, *(path for paths in found.saved.values() for path in paths)}
    linear = [path for path, module in base.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    own = (path for path in linear if not {"lora_A", "lora_B", "modules_to_save"} & set(path.split(".")))
    plain = (path.removesuffix(".base_layer").removesuffix(".original_module") for path in own)
    return [path for path in plain if not any(path == t or path.startswith(t + ".") for t in taken)]


def _warnings(job: Job) -> Iterator[str]:
    yield from _few_steps(job)
    steps = len(job.plan)
    if (warmup := warmup_steps(job.config, steps)) >= steps and not _is_still(job):
        yield _(
            "training.warmup: {warmup} warmup steps in a run of {steps} steps: the learning rate never reaches "
            "its peak.",
            warmup=warmup,
            steps=steps,
        )
    if job.config.eval_every and not (job.held_out or job.config.samples):
        yield _("training.eval_every: no examples are held out, so there is nothing to evaluate on.")
    if job.config.generate and not job.held_out:
        yield _("training.generate: no examples are held out, so no answers are generated at the evaluations.")
    if job.config.patience and not job.held_out:
        yield _("training.patience: no examples are held out, so training never stops early.")


def _few_steps(job: Job) -> Iterator[str]:
    """A small file with nothing said of passes: the first reply would be the base's own, and nobody would know why."""
    steps, given = len(job.plan), job.config.model_fields_set
    epochs = passes(steps)
    if epochs == 1 or given & {"epochs", "max_steps"}:
        return
    flags = f"--epochs {epochs}"
    size = HALF * sum(p.numel() for p in job.base.model.parameters())
    rate, _why = rate_for(epochs * steps, size)
    if "learning_rate" not in given and rate != job.config.learning_rate:
        flags += f" --learning-rate {rate:g}"
    yield _(
        "training.epochs: the data is small, and one epoch ({steps} steps) will hardly change the replies. Try "
        "{flags}; lorasmith init suggests all values.",
        steps=steps,
        flags=flags,
    )


def _problems(job: Job) -> Iterator[str]:
    if _is_still(job):
        yield _(
            "training.warmup: the learning rate is 0 at all {steps} steps, so nothing would be learned. Train "
            "for more steps (training.epochs, training.max_steps) or shorten training.warmup.",
            steps=len(job.plan),
        )


def _is_still(job: Job) -> bool:
    """Whether the learning rate is zero at every step."""
    steps = len(job.plan)
    return not any(learning_rate(job.config, steps, k) for k in range(steps))
