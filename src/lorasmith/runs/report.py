"""`lorasmith report`: what a run learned and forgot, whether LoRA was enough, and what to try next."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lorasmith.adapters.folder import AdapterFolder
from lorasmith.config.lora import LoraConfig
from lorasmith.config.model import ModelConfig
from lorasmith.config.preference import METHODS
from lorasmith.config.toml import Config
from lorasmith.evaluation.interval import Interval
from lorasmith.evaluation.loss import Comparison
from lorasmith.evaluation.trend import Trend, trend
from lorasmith.i18n import _, counted, listed
from lorasmith.lora.spectrum import LayerSpectrum, spectra
from lorasmith.report import Report
from lorasmith.runs.evidence import Evidence, measure
from lorasmith.runs.findings import (
    Finding,
    Key,
    falling_finding,
    forgotten_finding,
    gap_finding,
    learned_finding,
    rank_finding,
)
from lorasmith.runs.full_finding import full_finding
from lorasmith.runs.inspect import facts_of, inspect_folder
from lorasmith.runs.next_steps import NextStep, next_steps
from lorasmith.runs.study.place import place_in_study
from lorasmith.runs.subject import Subject, find_subject
from lorasmith.training.history import Points
from lorasmith.training.run_folder import CHOSEN_AT_START, flat_options

LAST_PART = 1 / 3  # of the training, whose trend tells whether the loss still falls
LEAST_EVALUATIONS = 4  # after step 0: with fewer, a trend of the gap has no interval worth the name


@dataclass(frozen=True)
class RunReport:
    """A report, before it becomes a page.

    facts: what was trained on what, as (label, text); end: the trend of the last part of the training loss.
    opening: the trend of held-out minus training loss, whose points are `gaps`.
    problems: figures that could not be measured, and why.
    """

    subject: Subject
    facts: list[tuple[str, str]]
    evidence: Evidence
    end: Trend | None
    gaps: Points
    opening: Trend | None
    spectra: list[LayerSpectrum]
    findings: dict[Key, Finding]
    steps: list[NextStep]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        evidence = self.evidence
        return {
            "run": str(self.subject.folder),
            "state": self.subject.state,
            "findings": {key: asdict(finding) for key, finding in self.findings.items()},
            "next": [asdict(step) for step in self.steps],
            "learned": _plain(evidence.learned),
            "forgotten": _plain(evidence.forgotten),
            "gap": _plain(evidence.gap),
            "later": _plain(evidence.later),
            "half_rank": _plain(evidence.half),
            "ranks": {rank: asdict(part) for rank, part in evidence.update.retained.items()} if evidence.update else {},
            "linear_layers": _plain(evidence.update.of_layers if evidence.update else None),
            "end": _plain(self.end),
            "layers": [
                {"path": one.path, "rank": one.rank,
                 "effective_rank": one.effective_rank if one.norm and not one.rest else None,
                 "directions_for_90_percent": one.directions, "norm": one.norm}
                for one in self.spectra
            ],
            "problems": list(self.problems),
        }  # fmt: skip


def make_report(
    path: str | Path,
    files: Sequence[str] = (),
    model: ModelConfig | None = None,
    quick: bool = False,
    report: Report | None = None,
) -> RunReport:
    """The report on a run or adapter folder.

    files: evaluate on their rows instead of the run's held-out examples. quick: without loading the base model.

    Raises AdapterError, ModelError, RunError or DataError.
    """
    report = report or Report()
    subject = find_subject(Path(path).expanduser())
    adapter = None if subject.is_whole_model else AdapterFolder.read(subject.adapter)
    layers = _spectra(adapter, report) if adapter else []
    evidence = _from_files(subject) if quick else measure(subject, files, model, report)
    layers = [*evidence.update.spectra] if evidence.update else layers
    for text in evidence.warnings:
        report.warn(text)
    end = trend(_last_part(subject.training))
    gaps = gaps_of(subject.training, subject.held_out)
    opening, place = trend(gaps, LEAST_EVALUATIONS), place_in_study(subject.folder)
    found = [
        learned_finding(evidence.learned, evidence.missing, _evaluations(subject)),
        forgotten_finding(evidence.forgotten),
        falling_finding(end, _rates(subject, end), subject.held_out),
        gap_finding(evidence.gap, evidence.trained_on, opening, evidence.later, _gap_hint(quick)),
        rank_finding(layers, evidence.half) if adapter else full_finding(evidence.update, evidence.missing),
        *([place.finding] if place else []),
    ]
    findings = {finding.key: finding for finding in found}
    return RunReport(
        subject,
        [*_facts(subject, adapter, evidence)],
        evidence,
        end,
        gaps,
        opening,
        layers,
        findings,
        [*next_steps(findings, subject), *(place.steps if place else ())],
        (*evidence.missing, *(_left_out(layers, adapter.config) if adapter else ())),
    )


def gaps_of(training: Points, held_out: Points) -> Points:
    """Held-out minus training loss at each evaluation; the training loss is the mean since the one before."""
    gaps: Points = []
    before = 0
    for step, loss in held_out:
        since = [value for at, value in training if before < at <= step]
        if since:
            gaps.append((step, loss - fmean(since)))
        before = step
    return gaps


def _spectra(adapter: AdapterFolder, report: Report) -> list[LayerSpectrum]:
    found = []
    total = sum("lora_A." in key or key.endswith("lora_embedding_A") for key in adapter.tensors)
    for one in spectra(adapter.tensors, adapter.config):
        found.append(one)
        report.progress(_("singular values"), len(found), max(total, len(found)))
    return found


def _from_files(subject: Subject) -> Evidence:
    """What summary.json tells, without loading a model."""
    summary = subject.summary
    missing = [_("This report was made with --quick, without the base model, so nothing was evaluated again.")]
    learned = None
    if subject.config and subject.config.training.method in METHODS:
        missing.append(_("The preference losses of a run are only judged without --quick."))
    elif summary and summary.interval and summary.loss_before is not None and summary.loss_after is not None:
        if summary.held_out_examples is None:
            missing.append(
                _("The run is from an earlier version and does not record how many examples it held out, so its "
                  "losses are not judged. Make the report without --quick.")
            )  # fmt: skip
        else:
            losses = summary.loss_before, summary.loss_after
            learned = Comparison(*losses, *summary.interval, summary.held_out_examples)
    return Evidence(learned, train_examples=summary.train_examples if summary else None, missing=tuple(missing))


def _last_part(training: Points) -> Points:
    if not training:
        return []
    first, last = training[0][0], training[-1][0]
    return [point for point in training if point[0] >= last - (last - first) * LAST_PART]


def _rates(subject: Subject, end: Trend | None) -> tuple[float, float] | None:
    """The learning rates at both ends of the trend."""
    if end is None:
        return None
    rates = {line["step"]: float(line["learning_rate"]) for line in subject.metrics if "learning_rate" in line}
    return (rates[end.first], rates[end.last]) if {end.first, end.last} <= rates.keys() else None


def _evaluations(subject: Subject) -> int:
    """From how many evaluations after step 0 the adapter was chosen."""
    return sum(step > 0 for step, _loss in subject.held_out) if subject.state == "finished" else 0


def _gap_hint(quick: bool) -> str:
    if quick:
        return _("Make the report without --quick, which evaluates training examples, too.")
    return _("Train with --held-out and --eval-every to see it.")


def _left_out(layers: Sequence[LayerSpectrum], config: LoraConfig) -> list[str]:
    """What the singular values do not contain."""
    texts = []
    if any(one.has_magnitude for one in layers):
        texts.append(_("DoRA also trains the length of each weight row; the singular values are those of B A alone."))
    whole = [*config.modules_to_save, *(["bias"] if config.bias != "none" else [])]
    if whole:
        texts.append(
            _(
                "What is trained in full ({names}) has no rank: it is not in the singular values, and stays whole "
                "where half the rank is tried.",
                names=listed(whole),
            )
        )
    return texts


def _facts(subject: Subject, adapter: AdapterFolder | None, evidence: Evidence) -> list[tuple[str, str]]:
    about = facts_of(adapter, subject.folder) if adapter else inspect_folder(subject.adapter)
    facts = [(_("base model"), str(about["base"] or _("not specified")))]
    if subject.config:
        facts.append((_("data"), listed(Path(name).name for name in subject.config.data.data)))
        facts.append((_("examples"), _examples(evidence)))
    size = _("{parameters:,} parameters, {mib:.1f} MiB", parameters=about["parameters"], mib=about["bytes"] / 2**20)
    facts.append((_("adapter"), "; ".join([*_of_adapter(about), size])) if adapter else (_("all weights"), size))
    facts += _of_run(subject) if subject.config else []
    return [(label, text) for label, text in facts if text]


def _of_adapter(about: Mapping[str, Any]) -> list[str]:
    """Its options, what is adapted, and its variants."""
    targets = about["target_modules"]
    options = _("r {r}, lora_alpha {alpha:g}", r=about["r"], alpha=about["lora_alpha"])
    names = targets if isinstance(targets, str) else listed([*targets, *about["target_parameters"]])
    return [options, names, *about["variants"]]


def _examples(evidence: Evidence) -> str:
    train, held_out = evidence.train_examples, evidence.learned.examples if evidence.learned else None
    parts = []
    if train is not None:
        parts.append(counted(train, _("1 to train on"), _("{count} to train on")))
    if held_out is not None:
        parts.append(counted(held_out, _("1 held out"), _("{count} held out")))
    return listed(parts)


def _of_run(subject: Subject) -> list[tuple[str, str]]:
    config, summary, about = subject.config, subject.summary, subject.environment
    assert config is not None
    epochs = subject.metrics and [line["epoch"] for line in subject.metrics if "epoch" in line]
    length = [counted(subject.steps or 0, _("1 step"), _("{count} steps"))]
    if epochs:
        length.append(_("{epochs:.1f} epochs", epochs=epochs[-1]))
    if summary:
        length.append(_("{tokens:,} tokens", tokens=summary.tokens))
        length.append(_("{minutes:.1f} minutes", minutes=summary.seconds / 60))
        length.append(_("{rate:,.0f} tokens/s", rate=summary.tokens_per_second))
        length.append(_("{mib:,.0f} MiB at most", mib=summary.peak_memory_mib))
    machine = [about.get("system"), about.get("device"), about.get("instructions"), about.get("dtype")]
    if (processes := about.get("processes", "1")) != "1":
        machine.append(_("{count} processes", count=processes))
    names = ("lorasmith", "torch", "transformers", "python")
    versions = [f"{name} {about[name]}" for name in names if name in about]
    return [
        (_("training"), listed(length)),
        (_("step that was kept"), str(subject.step) if subject.step else ""),
        (_("options that differ from the defaults"), listed(changed_options(config))),
        (_("machine"), listed(str(part) for part in machine if part)),
        (_("versions"), listed(versions)),
    ]


def changed_options(config: Config) -> list[str]:
    """Every option that differs from its default, but the base model, the data and what each start chooses itself."""
    shown = ("model.model", "data.data", *CHOSEN_AT_START)
    now, default = flat_options(config), flat_options(Config())
    changed = {key: value for key, value in now.items() if value != default[key] and key not in shown}
    return [f"{key.partition('.')[2]} = {_value(value)}" for key, value in changed.items()]


def _value(value: Any) -> str:
    """An option's value; of a path, the name alone."""
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(one: Comparison | Interval | Trend | None) -> Mapping[str, Any] | None:
    return None if one is None else asdict(one)
