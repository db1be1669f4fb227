"""The questions of a report, each with a plain answer, its evidence, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lorasmith.evaluation.interval import Interval
from lorasmith.evaluation.loss import MIN_EXAMPLES, Comparison, perplexity
from lorasmith.evaluation.preference import PreferenceComparison
from lorasmith.evaluation.results import Forgetting
from lorasmith.evaluation.trend import Trend
from lorasmith.i18n import _
from lorasmith.lora.spectrum import LayerSpectrum

Key = Literal["learned", "forgotten", "falling", "gap", "rank", "full", "study"]
Sure = Literal["clear", "likely", "hint", "unknown"]
Tone = Literal["good", "bad", "neutral", "unknown"]

SMALL_CHANGE = 0.01  # of the loss: a smaller fall in a third of the training is not worth another run
LARGE_GAP = 0.1  # of the fall on training examples; a smaller gap is usual even where nothing is memorized
MEMORIZED = 0.5  # of that fall: with such a gap, most of what was learned is about the training examples themselves
ALMOST_ALL = 0.9  # of the improvement: kept with half the rank, the other half is worth little


@dataclass(frozen=True)
class Finding:
    """One question with its answer.

    outcome: the answer as a word for programs; answer and evidence: sentences.
    """

    key: Key
    outcome: str
    answer: str
    evidence: tuple[str, ...]
    sure: Sure
    tone: Tone

    @property
    def question(self) -> str:
        """The question in words."""
        return {
            "learned": _("Did it learn?"),
            "forgotten": _("What did it forget?"),
            "falling": _("Is the training loss still falling?"),
            "gap": _("Did it memorize the training examples?"),
            "rank": _("Is the rank used up?"),
            "full": _("Was full fine-tuning needed?"),
            "study": _("What does its study say?"),
        }[self.key]

    @property
    def certainty(self) -> str:
        """How sure the answer is, in words."""
        return {
            "clear": _("clear: the 95% interval excludes the opposite"),
            "likely": _("likely, not proved by this run alone"),
            "hint": _("a hint only"),
            "unknown": _("not known"),
        }[self.sure]

    @property
    def how_sure(self) -> str:
        """`certainty` as a line of its own."""
        return _("How sure: {certainty}", certainty=self.certainty)


def interval_text(value: float, low: float, high: float) -> str:
    """A difference with its confidence interval."""
    return _("{value:+.3f} (95% CI {low:+.3f} to {high:+.3f})", value=value, low=low, high=high)


def comparison_text(one: Comparison) -> str:
    """The losses before and after, their difference with its interval, and the number of examples."""
    if isinstance(one, PreferenceComparison):
        return str(one)
    return _(
        "loss {before:.3f} -> {after:.3f}, perplexity {ppl_before:.1f} -> {ppl_after:.1f}; difference {difference}, "
        "{examples} examples",
        before=one.before,
        after=one.after,
        ppl_before=perplexity(one.before),
        ppl_after=perplexity(one.after),
        difference=interval_text(one.difference, one.low, one.high),
        examples=one.examples,
    )


def learned_finding(one: Comparison | None, missing: Sequence[str], evaluations: int = 0) -> Finding:
    """Did the held-out loss fall? evaluations: from how many the adapter was chosen, if from several."""
    if one is None:
        return Finding("learned", "unknown", _("Not known."), tuple(missing), "unknown", "unknown")
    evidence = [comparison_text(one)]
    if evaluations > 1:
        evidence.append(
            _(
                "What was kept is the best of {count} evaluations on these same examples, so its loss looks slightly "
                "better than it is.",
                count=evaluations,
            )
        )
    if one.examples < MIN_EXAMPLES:
        text = _("Too few held-out examples to tell; hold out {count} or more.", count=MIN_EXAMPLES)
        return Finding("learned", "unclear", text, tuple(evidence), "unknown", "unknown")
    if not one.is_significant:
        text = _("No measurable effect on held-out examples.")
        return Finding("learned", "none", text, tuple(evidence), "likely", "neutral")
    if one.difference < 0:
        text = _("Yes: the held-out loss fell by {fall:.2f} nats per token.", fall=-one.difference)
        if isinstance(one, PreferenceComparison):
            text = _("Yes: the held-out preference loss fell by {fall:.3f}.", fall=-one.difference)
        return Finding("learned", "better", text, tuple(evidence), "clear", "good")
    text = _("No: on held-out examples the base model was better.")
    return Finding("learned", "worse", text, tuple(evidence), "clear", "bad")


def forgotten_finding(one: Forgetting | None) -> Finding:
    """Did the loss on the general text rise?"""
    if one is None:
        text = _("Not known: this needs the base model. Make the report without --quick.")
        return Finding("forgotten", "unknown", text, (), "unknown", "unknown")
    evidence = (
        comparison_text(one),
        _("Evaluated on the general text of lorasmith, in English and Chinese; your own text may behave differently."),
    )
    if one.examples < MIN_EXAMPLES or not one.is_significant:
        text = _("Nothing measurable on general text.")
        return Finding("forgotten", "none", text, evidence, "likely", "good")
    if one.difference > 0:
        text = _("Some: the loss on general text rose by {rise:.2f} nats per token.", rise=one.difference)
        return Finding("forgotten", "forgot", text, evidence, "clear", "bad")
    text = _("Nothing: the loss on general text even fell, by {fall:.2f} nats per token.", fall=-one.difference)
    return Finding("forgotten", "better", text, evidence, "clear", "good")


def falling_finding(
    end: Trend | None,
    rates: tuple[float, float] | None = None,
    held_out: Sequence[tuple[int, float]] = (),
) -> Finding:
    """Is the training loss still falling?

    end: the trend of its last third; rates: learning rates in that time; held_out: losses of the evaluations, by step.
    """
    if end is None:
        text = _("Not known: too few steps were logged to tell a trend from noise.")
        remedy = _("Train for more steps, or use --log-every 1.")
        return Finding("falling", "unknown", text, (remedy,), "unknown", "unknown")
    change, low, high = end.change
    evidence = _falling_evidence(end, rates, held_out)
    small = SMALL_CHANGE * abs(end.mean)
    if high < 0 and change < -small:
        text = _("Yes: it was still falling when training ended.")
        return Finding("falling", "falling", text, evidence, "clear", "neutral")
    if low > 0 and change > small:
        text = _("No, it rises: training is unstable.")
        return Finding("falling", "rising", text, evidence, "clear", "bad")
    if low > -2 * small:
        text = _("No, it has leveled off.")
        return Finding("falling", "level", text, evidence, "likely", "good")
    text = _("Unclear: the losses of single steps scatter too much.")
    return Finding("falling", "unclear", text, evidence, "unknown", "unknown")


def _falling_evidence(
    end: Trend, rates: tuple[float, float] | None, held_out: Sequence[tuple[int, float]]
) -> tuple[str, ...]:
    evidence = [
        _(
            "In the last third of training (steps {first} to {last}, {points} logged losses) the loss changed by "
            "{change}; its mean there is {mean:.3f}.",
            first=end.first,
            last=end.last,
            points=end.points,
            change=interval_text(*end.change),
            mean=end.mean,
        )
    ]
    if rates and rates[1] < 0.5 * rates[0]:
        evidence.append(
            _(
                "The learning rate fell from {first:.2g} to {last:.2g} meanwhile, which flattens any curve: a level "
                "end alone does not prove that nothing is left to learn.",
                first=rates[0],
                last=rates[1],
            )
        )
    if len(held_out) > 2:
        (before, one), (after, other) = held_out[-2:]
        evidence.append(
            _(
                "Between the last two evaluations (steps {before} and {after}) the held-out loss changed by "
                "{change:+.3f}; no interval is known for that.",
                before=before,
                after=after,
                change=other - one,
            )
        )
    return tuple(evidence)


def gap_finding(
    gap: Interval | None,
    trained_on: Comparison | None,
    opening: Trend | None,
    later: Comparison | None,
    hint: str = "",
) -> Finding:
    """Is the gap between training and held-out loss opening, and does it hurt?

    opening: the trend of held-out minus training loss over the evaluations; later: the adapter against the one after
    the last step; hint: what to do if the gap cannot be known.
    """
    evidence = _gap_evidence(gap, opening, later)
    part = gap.value / abs(trained_on.difference) if gap and gap.is_significant and trained_on else 0.0
    is_opening = bool(opening and opening.low > 0)
    if later and later.is_significant and later.difference > 0:
        text = _("Yes: from some step on, the held-out loss rose. That is overfitting.")
        return Finding("gap", "harmful", text, evidence, "clear", "bad")
    if part > MEMORIZED:
        text = _("Yes: most of what was learned holds for the training examples only.")
        return Finding("gap", "memorized", text, evidence, "clear", "bad")
    if part > LARGE_GAP:
        text = _("Partly: {part:.0%} of what was learned holds for the training examples only.", part=part)
        return Finding("gap", "open", text, evidence, "clear", "neutral")
    if gap and gap.examples < MIN_EXAMPLES:
        text = _("Too few examples to tell.")
        return Finding("gap", "unclear", text, evidence, "unknown", "unknown")
    if is_opening and not gap:
        text = _("Perhaps: the gap between held-out and training loss grew.")
        return Finding("gap", "open", text, evidence, "hint", "neutral")
    if gap and trained_on:
        text = _("No: held-out examples improved as much as training examples, as far as can be measured.")
        is_sure = gap.high <= LARGE_GAP * abs(trained_on.difference)
        return Finding("gap", "closed", text, evidence, "likely" if is_sure else "hint", "good")
    if opening:
        text = _("Unclear: the gap changed too irregularly.")
        return Finding("gap", "unclear", text, evidence, "unknown", "unknown")
    return Finding("gap", "unknown", _("Not known."), (*evidence, *([hint] if hint else [])), "unknown", "unknown")


def _gap_evidence(gap: Interval | None, opening: Trend | None, later: Comparison | None) -> tuple[str, ...]:
    lines = []
    if gap:
        lines.append(
            _(
                "The loss fell more on training examples than on held-out ones by {gap} nats per token; the smaller "
                "of the two samples has {examples} examples.",
                gap=interval_text(gap.value, gap.low, gap.high),
                examples=gap.examples,
            )
        )
    if opening:
        lines.append(
            _(
                "Over {points} evaluations (steps {first} to {last}) held-out minus training loss changed by {change}.",
                points=opening.points,
                first=opening.first,
                last=opening.last,
                change=interval_text(*opening.change),
            )
        )
    if later:
        lines.append(
            _(
                "From this adapter to the last step, the held-out loss changed by {change} on {examples} examples.",
                change=interval_text(later.difference, later.low, later.high),
                examples=later.examples,
            )
        )
    return tuple(lines)


def rank_finding(spectra: Sequence[LayerSpectrum], half: Interval | None) -> Finding:
    """Is the rank used up? half: what remains of the improvement with half the rank."""
    usable = [one for one in spectra if one.rank > 1 and one.effective_rank == one.effective_rank]  # not NaN
    if not usable:
        text = _("Not known: no update has a rank above 1.")
        return Finding("rank", "unknown", text, (), "unknown", "unknown")
    shares = sorted(one.share for one in usable)
    share, ranks = median(shares), sorted({one.rank for one in usable})
    evidence = [
        _(
            "Effective rank: median {share:.0%} of the rank ({low:.0%} to {high:.0%} over {count} updates of rank "
            "{r}).",
            share=share,
            low=shares[0],
            high=shares[-1],
            count=len(usable),
            r=str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
        )
    ]
    if half is None or half.examples < MIN_EXAMPLES:
        evidence.append(
            _("Singular values alone cannot show that a larger rank would help: noise fills every direction, too.")
        )
        if share <= 0.5:
            text = _("Probably not: the updates are concentrated in few directions.")
            return Finding("rank", "spare", text, tuple(evidence), "hint", "good")
        text = _("Not known: this needs the base model and held-out examples on which the loss fell.")
        return Finding("rank", "unknown", text, tuple(evidence), "unknown", "unknown")
    evidence.insert(
        0,
        _(
            "With only the strongest half of the directions of every update, {value:.0%} of the improvement on "
            "{examples} held-out examples remains (95% CI {low:.0%} to {high:.0%}).",
            value=half.value,
            low=half.low,
            high=half.high,
            examples=half.examples,
        ),
    )
    if half.low >= ALMOST_ALL:
        text = _("No: half the rank would have done almost as well.")
        return Finding("rank", "spare", text, tuple(evidence), "likely", "good")
    if half.high < ALMOST_ALL:
        evidence.append(_("Only a run with a larger rank can show whether that would help."))
        text = _("Yes: the weaker half of the directions is needed, too.")
        return Finding("rank", "used", text, tuple(evidence), "hint", "neutral")
    text = _("Unclear: half the rank keeps about 90% of the improvement, give or take.")
    return Finding("rank", "unclear", text, tuple(evidence), "unknown", "unknown")
