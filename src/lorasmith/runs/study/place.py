"""Where a run stands in the study that it is a cell of, for its report."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from lorasmith.config.files import read_object
from lorasmith.config.study import label, setting_text
from lorasmith.errors import RunError
from lorasmith.i18n import _
from lorasmith.runs.findings import Finding, Sure
from lorasmith.runs.next_steps import NextStep
from lorasmith.runs.study.findings import interval_text, verdict
from lorasmith.runs.study.folder import PAGE, RESULT
from lorasmith.runs.study.result import Setting, StudyResult
from lorasmith.system.ownership import is_marked

CAPACITY = ("training.method", "lora.r")  # the options that decide how much can be learned


@dataclass(frozen=True)
class Place:
    """The finding about a run's place in its study, and what to look at next."""

    finding: Finding
    steps: tuple[NextStep, ...] = ()


def place_in_study(run: Path) -> Place | None:
    """The place of the run in the study whose folder it is in; None if it is not the run of a study."""
    run = run.resolve()
    study = run.parent
    if not is_marked(study, "study") or not (study / RESULT).is_file():
        return None
    try:
        result = StudyResult.from_json(read_object(study / RESULT, RunError))
    except (RunError, ValueError, KeyError, TypeError) as error:
        text = _("{path}: cannot be read ({error}). The study writes it again.", path=study / RESULT, error=error)
        return Place(Finding("study", "unknown", _("Not known."), (text,), "unknown", "unknown"))
    own = next((one for one in result.settings if any(cell.name == run.name for cell in one.cells)), None)
    return None if own is None else _place(result, own, study)


def _place(result: StudyResult, own: Setting, study: Path) -> Place:
    best, page = result.best, _("The page of the study: {file}", file=study / PAGE)
    if best is None or not math.isfinite(own.mean):
        text = _("Not known: no setting of the study has finished with a held-out loss.")
        return Place(Finding("study", "unknown", text, (page,), "unknown", "unknown"))
    done = sorted(one.mean for one in result.settings if math.isfinite(one.mean))
    evidence = [
        _(
            "By its held-out loss of {loss:.4f}, this setting ({name}) is number {place} of {count}.",
            loss=own.mean,
            name=own.name,
            place=done.index(own.mean) + 1,
            count=len(done),
        )
    ]
    compared = own.from_best
    if compared is not None:
        words = {"best": best.name, "loss": best.mean, "interval": interval_text(compared)}
        evidence.append(_("The best is {best}, with {loss:.4f}. From it to this one: {interval}.", **words))
    evidence += [*_by_capacity(result), page]
    if own.options == best.options:
        text = _("No setting of the study has a lower held-out loss than this one.")
        return Place(Finding("study", "best", text, tuple(evidence), "likely", "good"))
    if compared is None or not compared.exceeds_noise:
        text = _("The best setting of the study, {best}, cannot be told apart from this one.", best=best.name)
        if compared is None:
            text = _("Not known: this setting and the best one, {best}, cannot be compared.", best=best.name)
        return Place(Finding("study", "same" if compared else "unknown", text, tuple(evidence), "unknown", "neutral"))
    text = _("Another setting of the study is better: {best}.", best=best.name)
    sure: Sure = "clear" if compared.seeds else "likely"  # with one seed, another may turn it
    step = NextStep(
        _("The best setting of the study"),
        _("It is trained already, and its held-out loss is lower than that of this run."),
        shlex.join(["lorasmith", "report", str(study / best.cells[0].name)]),
    )
    return Place(Finding("study", "worse", text, tuple(evidence), sure, "bad"), (step,))


def _by_capacity(result: StudyResult) -> list[str]:
    """Whether full fine-tuning or a larger rank did better, each with its best other options."""
    lines = []
    for key in CAPACITY:
        values: dict[object, Setting] = {}
        for one in result.settings:
            value = one.options.get(key)
            if value is not None and math.isfinite(one.mean):
                values[value] = min(values.get(value, one), one, key=lambda setting: setting.mean)
        if len(values) > 1:
            texts = [_of_value(key, value, setting) for value, setting in values.items()]
            name = label(key)
            lines.append(_("By {name}, each at its best: {losses}.", name=name, losses="; ".join(texts)))
    return lines


def _of_value(key: str, value: object, best: Setting) -> str:
    """Its lowest loss, and whether that is worse than the lowest of all."""
    name, loss = setting_text({key: value}), f"{best.mean:.4f}"
    return f"{name}: {loss}" + (f" ({verdict(best.from_best)})" if best.from_best else "")
