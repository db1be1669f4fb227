"""The training plan in about ten lines, with the reason of each choice: shown by `check` and before every training."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.cells import cell_len
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasmith.config.training import SMALL_MODEL, usual_rate
from lorasmith.data.dataset.fit import rows_text
from lorasmith.evaluation.loss import MIN_EXAMPLES
from lorasmith.i18n import _, counted, listed
from lorasmith.lora.inject import ParameterCounts, count
from lorasmith.lora.quantized import count_parameters
from lorasmith.lora.target import describe_modules
from lorasmith.model.base import Base
from lorasmith.preflight.estimate import Estimate
from lorasmith.preflight.experts import Experts, expert_warnings, experts_of
from lorasmith.preflight.pairs import preference_text
from lorasmith.preflight.suggest import suggested_epochs
from lorasmith.system.device import dtype_name
from lorasmith.training.loop import Job
from lorasmith.training.optim import learning_rate, warmup_steps

LABEL = 9  # columns of a label
PATTERNS = 8  # of target modules that get a line each


@dataclass(frozen=True)
class Facts:
    """A training before its first step. Module paths are the base model's own; tokens are those of one epoch.

    experts: what is trained of the experts, if the model has any. preferences: what the pairs or rated answers are, if
    the training is on some.
    """

    model: str
    dtype: str
    quantize: str
    device: str
    why: dict[str, str]
    layout: str
    targets: dict[str, list[str]]
    saved: dict[str, list[str]]
    without_adapter: list[str]
    experts: Experts
    trainable: int
    parameters: int
    examples: int
    held_out: int
    tokens: int
    learned_tokens: int
    steps: int
    step_examples: int
    learning_rate: float | None
    schedule: str
    warmup: int
    answered: int
    answer_tokens: int
    expected: Estimate
    preferences: str = ""
    method: str = "lora"
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect_facts(job: Job, expected: Estimate) -> Facts:
    """Collect what `job` will do; no forward pass is made."""
    base, adapter = job.base, job.base.adapters[job.adapter]
    trainable, parameters = count(base.model, adapter)
    is_raced = job.config.learning_rate == "auto"
    return Facts(
        model=base.source,
        dtype=dtype_name(base.dtype),
        quantize=base.quantize,
        device=str(base.device),
        why=base.why if is_raced else base.why | {"learning_rate": _why_rate(job)},
        layout=base.layout,
        targets=adapter.targets.matched,
        saved=adapter.targets.saved,
        without_adapter=_without_adapter(base, job.adapter),
        experts=experts_of(base, adapter),
        trainable=trainable,
        parameters=parameters,
        examples=len(job.plan.lengths),
        held_out=len(job.held_out) // (job.preference.loss.unit if job.preference else 1),
        tokens=sum(job.plan.lengths),
        learned_tokens=sum(job.plan.n_targets),
        steps=len(job.plan),
        step_examples=job.plan.step_examples,
        learning_rate=None if is_raced else job.config.peak_learning_rate,
        schedule=job.config.schedule,
        warmup=warmup_steps(job.config, len(job.plan)),
        answered=len(job.evaluator.generation.prompts) if job.evaluator.generation else 0,
        answer_tokens=job.config.max_new_tokens,
        expected=expected,
        method=job.config.method,
        preferences=preference_text(job) if job.preference else "",
        warnings=[*_warnings(job), *expected.warnings],
        problems=[*_problems(job), *expected.problems],
    )


def fact_lines(facts: Facts) -> Iterator[str]:
    """The facts as lines of text, with their labels in one column."""
    for label, text in labeled_facts(facts):
        yield label + " " * (LABEL - cell_len(label)) + text


def labeled_facts(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts for display: (label, sentence), in reading order."""
    why = facts.why
    yield _("base"), _base(facts)
    yield _("layout"), why["layout"] if facts.layout == "packed" else _("padded: {reason}", reason=why["layout"])
    yield _("fast"), _("{parts} (verified equal to the standard step)", parts=why["fast"])
    if "plain" in why:
        yield _("normal"), _("not accelerated, because results differ: {parts}", parts=why["plain"])
    if len(facts.targets) > PATTERNS:  # such as the whole paths of an adapter that training continues from
        modules = list(dict.fromkeys(path for paths in facts.targets.values() for path in paths))
        yield (
            _("target"),
            _("{count} names match {modules}", count=len(facts.targets), modules=describe_modules(modules)),
        )
    for pattern, paths in facts.targets.items() if len(facts.targets) <= PATTERNS else ():
        yield _("target"), _("{pattern} matches {modules}", pattern=pattern, modules=describe_modules(paths))
    for name, paths in facts.saved.items():
        yield _("full"), _("{name} is copied and trained in full: {modules}", name=name, modules=listed(paths))
    yield _("layers"), _unadapted(facts) if facts.method != "full" else _("all weights are trained")
    yield from facts.experts.lines()
    yield _("params"), str(ParameterCounts(facts.trainable, facts.parameters))
    if facts.preferences:
        yield _("pairs"), facts.preferences
    yield _("steps"), _steps(facts)
    yield _("rate"), _rate(facts)
    if facts.answered:
        yield _("answers"), _answers(facts)
    yield from facts.expected.lines()


def _base(facts: Facts) -> str:
    text = _(
        "{model}: {dtype} on {device} ({why})",
        model=facts.model,
        dtype=facts.dtype,
        device=facts.device,
        why=facts.why["dtype"],
    )
    return text if facts.quantize == "none" else text + _("; weights quantized to {form}", form=facts.quantize)


def _unadapted(facts: Facts) -> str:
    text = _("every linear layer has an adapter")
    if facts.without_adapter:
        text = _("linear layers without an adapter: {modules}", modules=describe_modules(facts.without_adapter))
    return text


def _steps(facts: Facts) -> str:
    text = _(
        "{steps} of {examples}; {all} with {tokens:,} tokens per epoch, {held_out:,} held out",
        steps=steps_text(facts.steps),
        examples=examples_text(facts.step_examples),
        all=examples_text(facts.examples),
        tokens=facts.tokens,
        held_out=facts.held_out,
    )
    few = 0 < facts.held_out < MIN_EXAMPLES
    return text + (_(" (fewer than {fewest}, too few to detect a difference)", fewest=MIN_EXAMPLES) if few else "")


def _rate(facts: Facts) -> str:
    warmup = counted(facts.warmup, _("1 warmup step"), _("{count} warmup steps"))
    if facts.learning_rate is None:
        return _(
            "learning rate chosen by a race of several ({schedule}, {warmup})", schedule=facts.schedule, warmup=warmup
        )
    return _(
        "learning rate {rate:g} ({schedule}, {warmup}): {why}",
        rate=facts.learning_rate,
        schedule=facts.schedule,
        warmup=warmup,
        why=facts.why["learning_rate"],
    )


def _answers(facts: Facts) -> str:
    return _(
        "replies to {rows} of the held-out set at every evaluation, up to {tokens} tokens each; not included "
        "in the estimated time",
        rows=rows_text(facts.answered),
        tokens=facts.answer_tokens,
    )


def _why_rate(job: Job) -> str:
    config, method = job.config, job.config.method
    own = sum(p.numel() for p in job.parameters.tensors) if method != "full" else 0
    parameters = count_parameters(job.base.model) - own
    usual = usual_rate(parameters, method)
    if config.peak_learning_rate != usual:
        times = config.peak_learning_rate / usual
        return _("as requested: {times:.3g} times the usual {usual:g}", times=times, usual=usual)
    if parameters < SMALL_MODEL:
        return _("the usual value for this method on a small base model")
    return {"lora": _("the usual value for LoRA and QLoRA"), "full": _("the usual value for full fine-tuning")}.get(
        method, _("the usual value for an adapter trained on preferences")
    )


def _without_adapter(base: Base, adapter: str) -> list[str]:
    """Paths of the linear layers that no pattern matched, as the base model without adapters names them."""
    found = base.adapters[adapter].targets
    taken = {*found.adapted, *(path for paths in found.saved.values() for path in paths)}
    linear = [path for path, module in base.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    own = (path for path in linear if not {"lora_A", "lora_B", "modules_to_save"} & set(path.split(".")))
    plain = (path.removesuffix(".base_layer").removesuffix(".original_module") for path in own)
    return [path for path in plain if not any(path == t or path.startswith(t + ".") for t in taken)]


def _warnings(job: Job) -> Iterator[str]:
    yield from _few_steps(job)
    yield from expert_warnings(experts_of(job.base, job.base.adapters[job.adapter]), job.base.adapters[job.adapter])
    steps = len(job.plan)
    if (warmup := warmup_steps(job.config, steps)) >= steps and not _never_learns(job):
        yield _(
            "training.warmup: {warmup} in a run of {steps}: the learning rate never reaches its peak.",
            warmup=counted(warmup, _("1 warmup step"), _("{count} warmup steps")),
            steps=steps_text(steps),
        )
    if job.config.optimizer == "lion" and "learning_rate" not in job.config.model_fields_set:
        yield _(
            "training.learning_rate: the default of {rate:g} is for AdamW. Lion needs about a tenth of it: set "
            "--learning-rate {tenth:g}, for example.",
            rate=job.config.peak_learning_rate,
            tenth=job.config.peak_learning_rate / 10,
        )
    if job.config.eval_every and not (job.held_out or job.config.samples):
        yield _("training.eval_every: no examples are held out, so there is nothing to evaluate on.")
    if job.config.generate and not job.held_out:
        yield _("training.generate: no examples are held out, so no answers are generated at the evaluations.")
    if job.config.patience and not job.held_out:
        yield _("training.patience: no examples are held out, so training never stops early.")


def _few_steps(job: Job) -> Iterator[str]:
    """A warning if the data is small and no number of epochs is set: one epoch would hardly change the replies."""
    steps, given = len(job.plan), job.config.model_fields_set
    epochs = suggested_epochs(steps)
    if job.preference or epochs == 1 or given & {"epochs", "max_steps"}:
        return
    flags = f"--epochs {epochs}"
    yield _(
        "training.epochs: the data is small, and one epoch ({steps}) will hardly change the replies. Try "
        "{flags}; lorasmith init suggests all values.",
        steps=steps_text(steps),
        flags=flags,
    )


def _problems(job: Job) -> Iterator[str]:
    if _never_learns(job):
        yield _(
            "training.warmup: the learning rate is 0 at every step ({steps}), so nothing would be learned. Train "
            "for more steps (training.epochs, training.max_steps) or shorten training.warmup.",
            steps=steps_text(len(job.plan)),
        )


def _never_learns(job: Job) -> bool:
    """Whether the learning rate is zero at every step."""
    steps = len(job.plan)
    return not any(learning_rate(job.config, steps, k) for k in range(steps))


def steps_text(count: int) -> str:
    """'1 step', '2,000 steps'."""
    return counted(count, _("1 step"), _("{count} steps"))


def examples_text(count: int) -> str:
    """'1 example', '2,000 examples'."""
    return counted(count, _("1 example"), _("{count} examples"))
