"""What an evaluation found: of each adapter, its figures beside the base's; and replies side by side."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorasmith.evaluation.answers import Answer
from lorasmith.evaluation.loss import FEWEST, Comparison
from lorasmith.evaluation.metrics import Scored
from lorasmith.i18n import _, listed


@dataclass(frozen=True)
class Forgotten(Comparison):
    """The losses of base and adapter on another text than the adapter learned from."""

    @property
    def verdict(self) -> str:
        """The same in words."""
        if self.examples < FEWEST:
            return _("too few rows to tell; give a file with more rows")
        if not self.is_real:
            return _("no significant forgetting")
        if self.difference > 0:
            return _("significant FORGETTING; train for fewer steps or lower training.learning_rate to reduce it")
        return _("no forgetting: significantly better")


@dataclass(frozen=True)
class Measured:
    """One adapter against the base. `scores` is empty without answers, `forgotten` None where it was not asked."""

    name: str
    folder: str
    loss: Comparison
    scores: tuple[Scored, ...]
    forgotten: Forgotten | None


@dataclass(frozen=True)
class Sample:
    """A question, the answer of its row, the base's reply and those of the adapters in their order."""

    prompt: str
    reference: str
    source: str
    base: Answer
    adapters: tuple[Answer, ...]

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The base's, then the adapters'."""
        return self.base, *self.adapters


class Line(NamedTuple):
    """What one adapter, or the base, came to: as texts. Of the base, and of a perplexity, there is only the value."""

    who: str
    value: str
    difference: str = ""
    interval: str = ""
    is_real: str = ""
    verdict: str = ""
    tone: str = ""  # 'good' or 'bad' where the difference is clear of zero


class Group(NamedTuple):
    """One measure: the base's line, and one for each adapter."""

    name: str
    lines: list[Line]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of which base on which data; `forget_data` names what `forgotten` was measured on."""

    base: str
    data: tuple[str, ...]
    forget_data: str | None
    adapters: tuple[Measured, ...]
    samples: tuple[Sample, ...]

    def groups(self) -> Iterator[Group]:
        """Every figure with its interval and what it means, measure by measure."""
        losses = [adapter.loss for adapter in self.adapters]
        yield self._group(_("held-out loss"), losses, 4)
        values = [losses[0].before, *(loss.after for loss in losses)]
        lines = [Line(who, f"{math.exp(value):.1f}") for who, value in zip(self.names, values, strict=True)]
        yield Group(_("perplexity"), lines)
        for scores in zip(*(adapter.scores for adapter in self.adapters), strict=True):
            yield self._group(scores[0].name, scores, scores[0].digits)
        forgotten = [adapter.forgotten for adapter in self.adapters if adapter.forgotten]
        if forgotten:
            yield self._group(_("loss on {file}", file=Path(self.forget_data or "").name), forgotten, 4)

    def in_words(self) -> list[str]:
        """For each adapter, what its differences mean: a sentence for the measures of which the same is to be said."""
        said: dict[tuple[str, str], list[str]] = {}
        for group in self.groups():
            for line in group.lines[1:]:
                if line.verdict:
                    said.setdefault((line.who, line.verdict), []).append(group.name)
        return [
            _("{name}: {measures}: {verdict}", name=name, measures=listed(measures), verdict=verdict)
            for name in self.names[1:]
            for (who, verdict), measures in said.items()
            if who == name
        ]

    @property
    def names(self) -> list[str]:
        """The base, then the adapters."""
        return [_("base"), *(adapter.name for adapter in self.adapters)]

    def to_json(self) -> dict[str, Any]:
        """Plain values. The first adapter's loss stands at the top too, for whoever has one adapter."""
        first = self.adapters[0].loss
        return {
            **asdict(first),
            "difference": first.difference,
            "base": self.base,
            "data": list(self.data),
            "forget_data": self.forget_data,
            "adapters": [
                {
                    "name": adapter.name,
                    "folder": adapter.folder,
                    "loss": _plain(adapter.loss),
                    "scores": {score.key: _plain(score) for score in adapter.scores},
                    "forgotten": _plain(adapter.forgotten) if adapter.forgotten else None,
                }
                for adapter in self.adapters
            ],
            "samples": [asdict(sample) for sample in self.samples],
        }

    def _group(self, name: str, found: Sequence[Comparison], digits: int) -> Group:
        lines = [Line(_("base"), f"{found[0].before:.{digits}f}")]
        for adapter, one in zip(self.adapters, found, strict=True):
            span = f"[{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
            texts = f"{one.after:.{digits}f}", f"{one.difference:+.{digits}f}", span
            is_better = (one.difference > 0) == isinstance(one, Scored)
            tone = "" if not one.is_real else "good" if is_better else "bad"
            lines.append(Line(adapter.name, *texts, _is_real(one, is_better), one.verdict, tone))
        return Group(name, lines)


def _is_real(found: Comparison, is_better: bool) -> str:
    """The verdict in a word or two, for a narrow column."""
    if found.examples < FEWEST:
        return _("too few")
    if not found.is_real:
        return _("no")
    return _("yes, better") if is_better else _("yes, WORSE")


def _plain(found: Comparison) -> dict[str, Any]:
    values = {key: value for key, value in asdict(found).items() if key not in ("key", "digits")}
    return {**values, "difference": found.difference, "is_real": found.is_real, "verdict": found.verdict}
