"""The answer of a report on full fine-tuning to whether that was needed."""

from collections.abc import Mapping, Sequence
from statistics import median_low

from lorasmith.evaluation.interval import Interval
from lorasmith.evaluation.loss import MIN_EXAMPLES
from lorasmith.i18n import _
from lorasmith.lora.spectrum import LayerSpectrum
from lorasmith.runs.findings import ALMOST_ALL, Finding
from lorasmith.runs.whole_update import WholeUpdate


def full_finding(update: WholeUpdate | None, missing: Sequence[str]) -> Finding:
    """Was full fine-tuning needed? By how much of its improvement remains where the update is cut to a rank.

    outcome: 'rank N' if that rank of the update keeps almost all of it; 'needed' if no rank of `RANKS` does; 'others'
    if not even the whole update of the linear layers does. missing: why there is no update.
    """
    if update is None:
        return Finding("full", "unknown", _("Not known."), tuple(missing), "unknown", "unknown")
    usable = {rank: part for rank, part in sorted(update.retained.items()) if part.examples >= MIN_EXAMPLES}
    evidence = (*_remaining(update, usable), *_directions(update))
    if not usable:
        text = _("Not known: this needs held-out examples on which the loss fell.")
        return Finding("full", "unknown", text, evidence, "unknown", "unknown")
    enough = [rank for rank, part in usable.items() if part.low >= ALMOST_ALL]
    if enough:
        text = _("Probably not: cut to rank {rank}, the update does almost as well.", rank=enough[0])
        return Finding("full", f"rank {enough[0]}", text, evidence, "likely", "neutral")
    largest, part = list(usable.items())[-1]
    if update.of_layers is not None and update.of_layers.high < ALMOST_ALL:
        text = _("Perhaps: a part of the effect is in weights that LoRA leaves as they are by default.")
        return Finding("full", "others", text, evidence, "hint", "neutral")
    if part.high < ALMOST_ALL:
        text = _("Perhaps: cut to rank {rank}, the update loses a part of its effect.", rank=largest)
        return Finding("full", "needed", text, evidence, "hint", "neutral")
    text = _("Unclear: cut to rank {rank}, the update keeps about 90% of its effect, give or take.", rank=largest)
    return Finding("full", "unclear", text, evidence, "unknown", "unknown")


def directions_text(one: LayerSpectrum) -> str:
    """How many directions hold 90% of the squared update; only the largest singular values may be known."""
    return f"≥{one.directions}" if one.directions > one.rank else str(one.directions)


def _remaining(update: WholeUpdate, usable: Mapping[int, Interval]) -> list[str]:
    lines = [
        _(
            "With only the {rank} strongest directions of the update of each linear layer, and everything else as in "
            "the base model, {value:.0%} of the improvement on {examples} held-out examples remains (95% CI {low:.0%} "
            "to {high:.0%}).",
            rank=rank,
            value=update.retained[rank].value,
            low=update.retained[rank].low,
            high=update.retained[rank].high,
            examples=update.retained[rank].examples,
        )
        for rank in usable
    ]
    if lines and (whole := update.of_layers) is not None:
        lines.append(
            _(
                "With all directions of it, {value:.0%} remains (95% CI {low:.0%} to {high:.0%}). What is missing then "
                "comes from embeddings, norms, biases and the head, some of which --modules-to-save trains.",
                value=whole.value,
                low=whole.low,
                high=whole.high,
            )
        )
    if lines:
        lines.append(
            _(
                "A LoRA run of that rank does not cut an update but trains its own, which may be better than this one: "
                "only such a run can show it."
            )
        )
    return lines


def _directions(update: WholeUpdate) -> list[str]:
    changed: Sequence[LayerSpectrum] = sorted(
        (one for one in update.spectra if one.norm > 0), key=lambda one: one.directions
    )
    if not changed:
        return []
    low, middle, high = changed[0], median_low([one.directions for one in changed]), changed[-1]
    lines = [
        _(
            "90% of the squared update of a layer is in {middle} directions in the median ({low} to {high} over "
            "{count} layers).",
            middle=directions_text(next(one for one in changed if one.directions == middle)),
            low=directions_text(low),
            high=directions_text(high),
            count=len(changed),
        )
    ]
    if update.rounded_to:
        lines.append(
            _(
                "The weights are in {dtype}, whose rounding adds noise in all directions: more of them seem to be used "
                "than were learned.",
                dtype=update.rounded_to,
            )
        )
    return lines
