"""What `check` and `train` say about preference rows: how many there are, and how long their answers are."""

from collections.abc import Sequence

from lorasmith.i18n import _
from lorasmith.model.row import Example
from lorasmith.training.loop import Job


def preference_text(job: Job) -> str:
    """The number of pairs or of rated answers, the lengths of the answers, and what shared prompts save."""
    assert job.preference is not None
    good = [example for example in job.train if example.desirable]
    bad = [example for example in job.train if not example.desirable]
    values = {"good": _lengths(good), "bad": _lengths(bad)}
    if job.preference.loss.unit == 1:
        return _(
            "{good_count:,} good answers of {good} tokens, {bad_count:,} bad answers of {bad} tokens",
            good_count=len(good),
            bad_count=len(bad),
            **values,
        )
    laid, whole = sum(job.plan.lengths), sum(example.useful_length for example in job.train)
    return _(
        "{count:,} pairs: chosen answers of {good} tokens, rejected ones of {bad}; shared prompts are computed once: "
        "{laid:,} instead of {whole:,} tokens",
        count=len(good),
        laid=laid,
        whole=whole,
        **values,
    )


def _lengths(examples: Sequence[Example]) -> str:
    """'3-40 (mean 17)': the tokens of the answers."""
    lengths = [sum(example.weights[i] > 0 for i in example.learned) for example in examples]
    if not lengths:
        return "0"
    return _("{low}-{high} (mean {mean:.0f})", low=min(lengths), high=max(lengths), mean=sum(lengths) / len(lengths))
