"""What to try after a run, each with the command to run: only where the findings of its report call for it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.config.lora import LoraConfig
from lorasmith.config.toml import Config
from lorasmith.i18n import _, joined
from lorasmith.runs.findings import Finding, Key
from lorasmith.runs.subject import Subject
from lorasmith.training.run_files import RUN_CONFIG

LARGE_RANK = 64  # from here on, a still larger rank costs about as much as full fine-tuning does in a small model
EVALUATIONS = 10  # in a training, if none was asked for
PATIENCE = 3  # of these without a better held-out loss


@dataclass(frozen=True)
class NextStep:
    """One thing to try: what, why, and the command; empty if none does it alone."""

    what: str
    why: str
    command: str


def next_steps(findings: Mapping[Key, Finding], subject: Subject) -> list[NextStep]:
    """What the findings call for, the most useful first; empty if nothing does."""
    config = subject.config
    if config is None:
        return []
    outcomes = {key: finding.outcome for key, finding in findings.items()}
    return [*_missing(outcomes, subject, config), *_changes(outcomes, subject, config)]


def command(subject: Subject, suffix: str, *flags: str) -> str:
    """The command that trains again as in `subject`, with other flags, in another folder."""
    folder = subject.folder
    words = ["lorasmith", "train", "--config", str(folder / RUN_CONFIG)]
    return shlex.join([*words, "--output", str(folder.with_name(f"{folder.name}-{suffix}")), *flags])


def _missing(outcomes: Mapping[Key, str], subject: Subject, config: Config) -> list[NextStep]:
    """Options of the training without which a report cannot tell more."""
    steps = []
    if not config.data.held_out:
        steps.append(
            NextStep(
                _("Hold out examples"),
                _("Without them, nobody knows whether new examples come out better."),
                command(subject, "held-out", "--held-out", "0.1"),
            )
        )
    elif outcomes.get("gap") in ("open", "memorized") and not config.training.eval_every:
        steps.append(
            NextStep(
                _("Evaluate during training"),
                _("Then the report can tell whether, and when, the held-out loss began to rise."),
                command(subject, "evaluated", "--eval-every", _every(subject)),
            )
        )
    return steps


def _changes(outcomes: Mapping[Key, str], subject: Subject, config: Config) -> list[NextStep]:
    rate, worse = config.training.peak_learning_rate, outcomes.get("learned") == "worse"
    if outcomes.get("gap") == "harmful":
        return _against_overfitting(subject, config)
    if worse or outcomes.get("falling") == "rising":
        lower = f"{rate / 3:.2g}"
        why = _("The training made the model worse: too large a learning rate is the usual reason.")
        if not worse:
            why = _("A rising training loss is a sign of too large a learning rate.")
        return [NextStep(_("A lower learning rate"), why, command(subject, f"lr{lower}", "--learning-rate", lower))]
    steps = []
    has_gap = outcomes.get("gap") in ("open", "memorized")
    if outcomes.get("falling") == "falling" and outcomes.get("gap") != "memorized":
        steps.append(_longer(subject, config))
    if outcomes.get("learned") == "none" and outcomes.get("falling") in ("level", "unclear", "unknown"):
        higher = f"{rate * 3:.2g}"
        why = _("The training had no measurable effect: a larger learning rate moves the weights further.")
        steps.append(
            NextStep(_("A higher learning rate"), why, command(subject, f"lr{higher}", "--learning-rate", higher))
        )
    if outcomes.get("rank") == "used" and not has_gap:
        steps.append(_more_capacity(subject, config))
    if (enough := outcomes.get("full", "")).startswith("rank "):
        steps.append(_lora(subject, config, enough.removeprefix("rank ")))
    if has_gap:
        why = _(
            "Training examples improve more than held-out ones, so more, and more varied, examples would help most."
        )
        steps.append(NextStep(_("More data"), why, ""))
    if outcomes.get("forgotten") == "forgot":
        lower = f"{rate / 2:.2g}"
        why = _(
            "General text became harder for the model. A lower rate forgets less, at the price of learning less; only "
            "you know which matters more."
        )
        steps.append(
            NextStep(_("A lower learning rate, against forgetting"), why,
                     command(subject, f"lr{lower}", "--learning-rate", lower))
        )  # fmt: skip
    return steps


def _against_overfitting(subject: Subject, config: Config) -> list[NextStep]:
    why = _(
        "The held-out loss was lowest after step {step} and then rose. The run kept the weights of that step, so only "
        "the time after it was wasted.",
        step=subject.step,
    )
    flags = ["--eval-every", str(config.training.eval_every or _every(subject)), "--patience", str(PATIENCE)]
    return [
        NextStep(_("Stop earlier"), why, command(subject, "patient", *flags)),
        NextStep(_("More data"), _("With more examples, it takes longer until they are memorized."), ""),
    ]


def _longer(subject: Subject, config: Config) -> NextStep:
    training, why = config.training, _("The training loss was still falling when training ended.")
    steps, epochs = training.max_steps, training.epochs
    flags = ["--max-steps", str(2 * steps)] if steps else ["--epochs", f"{2 * epochs:g}"]
    if config.data.held_out:
        until = _("With --patience, training stops once the held-out loss no longer improves.")
        why = joined(f"{why} {until}")
        flags += ["--eval-every", str(training.eval_every or _every(subject)), "--patience", str(PATIENCE)]
    return NextStep(_("Train for longer"), why, command(subject, "longer", *flags))


def _more_capacity(subject: Subject, config: Config) -> NextStep:
    r, why = (
        config.lora.r,
        _("Even the weaker half of the directions improves held-out examples, so more directions may help further."),
    )
    if r >= LARGE_RANK and config.training.method == "lora":
        return NextStep(_("Full fine-tuning"), why, _full(subject, config))
    alpha = _(
        "lora_alpha stays as it is: with the factor lora_alpha / r, the best learning rate hardly depends on the rank "
        '("LoRA Without Regret", Thinking Machines 2025).'
    )
    return NextStep(_("A larger rank"), joined(f"{why} {alpha}"), command(subject, f"r{4 * r}", "--r", str(4 * r)))


def _full(subject: Subject, config: Config) -> str:
    """The command of full fine-tuning, which accepts the options of adapters at their defaults only.

    Its best learning rate is about a tenth of LoRA's ("LoRA Without Regret"). Empty if a flag cannot set a default.
    """
    default = LoraConfig()
    flags = ["--method", "full", "--learning-rate", f"{config.training.peak_learning_rate / 10:.2g}"]
    for key in (key for key, value in config.lora if value != getattr(default, key)):
        value = getattr(default, key)
        if isinstance(value, dict | tuple) or value is None:
            return ""
        flag = "--" + key.replace("_", "-")
        flags += [flag.replace("--", "--no-", 1)] if value is False else [flag, str(value)]
    flags += ["--quantize", "none"] if config.model.quantize != "none" else []
    return command(subject, "full", *flags)


def _lora(subject: Subject, config: Config, rank: str) -> NextStep:
    """The command of LoRA in place of full fine-tuning, at ten times its learning rate, as in `_full`."""
    rate = f"{config.training.peak_learning_rate * 10:.2g}"
    why = _(
        "The update of this run hardly needs more than rank {rank}. LoRA trains with less memory, and its adapter is a "
        'small file. Its best learning rate is about ten times as large ("LoRA Without Regret", Thinking Machines '
        "2025).",
        rank=rank,
    )
    flags = ["--method", "lora", "--r", rank, "--learning-rate", rate]
    return NextStep(_("LoRA with rank {rank}", rank=rank), why, command(subject, f"lora-r{rank}", *flags))


def _every(subject: Subject) -> str:
    return str(max((subject.steps or 1) // EVALUATIONS, 1))
