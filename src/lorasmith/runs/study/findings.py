"""What a study found, in sentences: which differences are larger than the noise, and what is left open."""

import math
from collections.abc import Iterator

from lorasmith.config.study import RATE, label, value_text
from lorasmith.evaluation.seeds import SeedComparison
from lorasmith.i18n import _, counted, listed
from lorasmith.runs.study.result import Curve, Setting, StudyResult

NAMED = 8  # settings that a sentence lists


def findings(result: StudyResult) -> list[str]:
    """The findings, the most important ones first; empty if no cell has been trained."""
    best = result.best
    if best is None:
        return [*_failures(result), *_open(result)]
    return [
        *_best(result, best),
        *_edges(result),
        *_curves(result, best),
        *_same(result, best),
        *_forgotten(result, best),
        *_seeds(result),
        *_failures(result),
        *_open(result),
    ]


def axis_text(key: str) -> str:
    """The option of the axis in words."""
    return _("learning rate") if key == RATE else label(key)


def verdict(compared: SeedComparison | None) -> str:
    """Whether a setting is worse than the best one, in words."""
    if compared is None:
        return ""
    if compared.exceeds_noise:
        return _("worse") if compared.difference > 0 else _("better")
    return _("no clear difference")


def interval_text(compared: SeedComparison) -> str:
    """The difference with its intervals over examples and over seeds."""
    examples = compared.examples
    text = _(
        "{difference:+.4f} ({share:+.1%}), 95% confidence interval over examples [{low:+.4f}, {high:+.4f}]",
        difference=compared.difference,
        share=compared.difference / examples.before,
        low=examples.low,
        high=examples.high,
    )
    if compared.seeds is None:
        return text
    low, high = compared.seeds
    return text + _(", over {runs} seeds [{low:+.4f}, {high:+.4f}]", runs=compared.runs, low=low, high=high)


def _best(result: StudyResult, best: Setting) -> Iterator[str]:
    runs = counted(len(best.cells), _("one seed"), _("the mean of {count} seeds"))
    yield _("The lowest held-out loss has {name}: {loss:.4f} ({runs}).", name=best.name, loss=best.mean, runs=runs)
    before = next(cell.loss.before for cell in best.cells if cell.loss)
    if best.mean >= before:
        yield _("No setting is better than the base model, whose loss is {loss:.4f}.", loss=before)
    if len(best.cells) == 1:
        yield _(
            "Each setting was trained with one seed, so what another seed would change is not known. List several "
            'values of "training.seed" to know it.'
        )


def _edges(result: StudyResult) -> Iterator[str]:
    """Curves whose best setting is at an end, so that a better one may lie beyond."""
    lowest, highest = list[Curve](), list[Curve]()
    for curve in result.curves:
        if len(curve.settings) > 2 and math.isfinite(curve.best.mean):
            places = {0: lowest, len(curve.settings) - 1: highest}
            places.get(curve.settings.index(curve.best), []).append(curve)
    texts = {
        _("the lowest"): lowest,
        _("the highest"): highest,
    }
    for end, curves in texts.items():
        if curves:
            yield _(
                "{names}: the best {axis} is {end} of the grid, so a better one may lie beyond it.",
                names=listed(curve.name or _("all runs") for curve in curves),
                axis=axis_text(result.axis),
                end=end,
            )


def _curves(result: StudyResult, best: Setting) -> Iterator[str]:
    """Each curve's own best setting compared with the best of all."""
    if len(result.curves) < 2:
        return
    for curve in result.curves:
        own = curve.best
        if own.options == best.options or own.from_best is None:
            continue
        words = {"name": curve.name, "axis": axis_text(result.axis), "best": best.name}
        words |= {"value": value_text(own.options.get(result.axis)), "interval": interval_text(own.from_best)}
        at = _("{name} at its best {axis} of {value}", **words) if result.axis else own.name
        yield (
            _("{at} is worse than {best}: {interval}; that is larger than the noise.", at=at, **words)
            if own.from_best.exceeds_noise
            else _("{at} cannot be told apart from {best}: {interval}.", at=at, **words)
        )


def _same(result: StudyResult, best: Setting) -> Iterator[str]:
    """The settings of the best curve that cannot be told apart from the best one."""
    curve = next(curve for curve in result.curves if any(one.options == best.options for one in curve.settings))
    same = [one for one in curve.settings if one.from_best is not None and not one.from_best.exceeds_noise]
    if same and result.axis:
        yield _(
            "Of the other values of {axis} there, these cannot be told apart from the best: {values}.",
            axis=axis_text(result.axis),
            values=listed(value_text(one.options[result.axis]) for one in same),
        )


def _forgotten(result: StudyResult, best: Setting) -> Iterator[str]:
    found = [cell.general for cell in best.cells if cell.general]
    if not found:
        return
    if all(one.is_significant and one.difference > 0 for one in found):
        text = _("{name} forgot: its loss on the general text rose by {rise:.4f} from {before:.4f}.")
    elif all(one.is_significant and one.difference < 0 for one in found):
        text = _("{name} forgot nothing: its loss on the general text changed by {rise:+.4f} from {before:.4f}.")
    else:
        text = _(
            "{name}: the change of its loss on the general text, {rise:+.4f} from {before:.4f}, is within the noise."
        )
    yield text.format(name=best.name, rise=best.forgetting, before=found[0].before)


def _seeds(result: StudyResult) -> Iterator[str]:
    spreads = [max(one.losses) - min(one.losses) for one in result.settings if len(one.losses) > 1]
    if spreads:
        yield _(
            "Runs that differ only in their seed differ by {typical:.4f} in the median, and by at most {most:.4f}.",
            typical=sorted(spreads)[len(spreads) // 2],
            most=max(spreads),
        )
    if any(one.from_best and one.from_best.runs == 2 for one in result.settings):
        yield _(
            "With two seeds, an interval over seeds is wide (Student's t with one degree of freedom); three or more "
            "seeds tell smaller differences apart."
        )
    if len(result.settings) > 2:
        yield _(
            "The best of {count} settings was chosen by the same held-out examples on which its loss is reported, so "
            "on new data expect a little more.",
            count=len(result.settings),
        )


def _failures(result: StudyResult) -> Iterator[str]:
    failed = [cell.name for cell in result.cells if cell.state == "failed"]
    if failed:
        names = listed(failed[:NAMED] + (["..."] if len(failed) > NAMED else []))
        yield _("Failed, mostly because the training diverged: {names}.", names=names)


def _open(result: StudyResult) -> Iterator[str]:
    waiting = sum(cell.state == "open" for cell in result.cells)
    if waiting:
        yield _("Not trained yet: {waiting} of {all} runs.", waiting=waiting, all=len(result.cells))
