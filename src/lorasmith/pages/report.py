"""The report on a run as a self-contained HTML page, in light or dark as the reader's system is set, and for paper."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lorasmith.i18n import _, counted, language
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.pages.page import render_template
from lorasmith.pages.pictures import pictures
from lorasmith.runs.evidence import ANSWERS
from lorasmith.runs.full_finding import directions_text
from lorasmith.runs.report import RunReport
from lorasmith.runs.whole_update import RANKS
from lorasmith.system.writing import write_file
from lorasmith.version import installed_version


@dataclass(frozen=True)
class KindRow:
    """The updates of all modules of one kind, as text for a row of the table."""

    kind: str
    updates: int
    rank: str
    effective: str
    directions: str
    norm: str


def write_page(report: RunReport, file: Path) -> None:
    """Write the page. Raises RunError if it cannot be written, MissingExtraError without matplotlib."""
    write_file(file, render_page(report), is_run=False)


def render_page(report: RunReport) -> str:
    """The page as HTML. Texts of the data are escaped. Raises MissingExtraError without matplotlib."""
    enough = [report.findings[key] for key in ("falling", "gap", "rank", "full") if key in report.findings]
    return render_template(
        "report.html",
        r=report,
        findings=list(report.findings.values()),
        enough=enough,
        pictures=pictures(report),
        kinds=list(kind_rows(report.spectra)),
        directions=directions_text,
        whole=report.subject.is_whole_model,
        places={"worst": _("worst"), "middle": _("middle"), "best": _("best")},
        run=report.subject.folder.resolve().name,
        state=_state(report),
        version=installed_version() or "",
        lang=language(),
        t=_texts(report),
    )


def kind_rows(layers: Sequence[LayerSpectrum]) -> Iterator[KindRow]:
    """A row for each kind of module, with medians and, if they differ, their range."""
    kinds: dict[str, list[LayerSpectrum]] = {}
    for one in layers:
        if one.norm > 0:
            kinds.setdefault(one.kind, []).append(one)
    for kind, found in kinds.items():
        yield KindRow(
            kind,
            len(found),
            _range([one.rank for one in found], "d"),
            _range([one.effective_rank for one in found], ".1f"),
            _range([one.directions for one in found], "d", max(one.rank for one in found)),
            _range([one.norm for one in found], ".3g"),
        )


def _range(values: Sequence[float], form: str, most: float = math.inf) -> str:
    """The median and the range. most: larger values are only lower bounds."""
    low, middle, high = (
        f"{value:{form}}" if value <= most else f"≥{value:{form}}"
        for value in (min(values), _median(values, form), max(values))
    )
    return middle if low == high else f"{middle} ({low}-{high})"


def _median(values: Sequence[float], form: str) -> float:
    return int(median(values)) if form == "d" else median(values)


def _state(report: RunReport) -> str:
    subject = report.subject
    if subject.state == "adapter":
        return _("An adapter folder without its run: how it was trained is not known here.")
    if subject.state == "finished":
        return ""
    return _(
        "This run is not finished. The report is about its latest checkpoint, after step {step}.", step=subject.step
    )


def _texts(report: RunReport) -> dict[str, str]:
    """The labels of the page."""
    whole = report.subject.is_whole_model
    return {
        "title": _("Training report"),
        "glance": _("At a glance"),
        "next": _("What to try next"),
        "nothing_next": _("Nothing is called for: no finding of this report suggests a different setting."),
        "no_run_next": _("Without its run folder, the options of its training are not known, so nothing is suggested."),
        "not_known": _("What is not known"),
        "learned": _("Did it learn?"),
        "forgotten": _("What did it forget?"),
        "enough": _("Was full fine-tuning needed?") if whole else _("Was LoRA enough?"),
        "trained": _("What was trained, and on what"),
        "examples": _("Answers side by side"),
        "chosen": _chosen(report),
        "reference": _("reference answer"),
        "base": _("base"),
        "adapter": _("trained") if whole else _("adapter"),
        "cut": _("truncated at the length limit"),
        "empty": _("(empty)"),
        "loss": _("loss"),
        "kind": _("module"),
        "updates": _("updates"),
        "rank": _("rank"),
        "effective": _("effective rank"),
        "directions": _("directions for 90%"),
        "norm": _("size"),
        "all_layers": _("All {updates}", updates=counted(len(report.spectra), _("1 update"), _("{count} updates"))),
        "explained": _(
            "The singular values of W - W0 tell how what was learned is spread over the directions of a layer; the "
            "{rank} largest are computed. Directions for 90%: how many of them hold 90% of the squared update. Size: "
            "its Frobenius norm. Medians, with the range in parentheses.",
            rank=RANKS[0],
        )
        if whole
        else _(
            "The singular values of s·B·A tell how the update of a layer is spread over its r directions. The "
            "effective rank is the exponential of their entropy (Roy and Vetterli 2007): 1 if one direction holds "
            "everything, r if all are equal. Directions for 90%: how many of them hold 90% of the squared update. "
            "Size: its Frobenius norm. Medians, with the range in parentheses."
        ),
        "method": _("How these figures were made"),
        "methods": _(
            "Loss is in nats per target token; lower is better. Intervals of losses are a paired bootstrap over the "
            "examples with 2,000 resamples. The trend of a curve is a least-squares line; its interval counts "
            "neighboring points that are alike as fewer points (Santer et al. 2000). A 95% interval misses the true "
            "value once in twenty times, and a report with several of them more often. All of it describes this one "
            "run: another seed gives somewhat different figures."
        ),
    }  # fmt: skip


def _chosen(report: RunReport) -> str:
    """How the examples were chosen that are shown."""
    return _(
        "Of the {count} held-out examples with a prompt and a complete answer, ordered by how much the training "
        "changed their loss: the first, the middle and the last ones, whatever they say. Answers are decoded "
        "greedily, up to {tokens} tokens.",
        count=f"{report.evidence.eligible:,}",
        tokens=ANSWERS.max_new_tokens,
    )
