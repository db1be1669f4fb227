"""The result of an evaluation: losses and scores of each adapter beside those of the base model, and the answers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorasmith.evaluation.generation import Answer
from lorasmith.evaluation.loss import MIN_EXAMPLES, Comparison, perplexity
from lorasmith.evaluation.metrics import MetricComparison
from lorasmith.evaluation.preference import PreferenceComparison
from lorasmith.i18n import _, listed


@dataclass(frozen=True)
class Forgetting(Comparison):
    """The losses of base model and adapter on a text that the adapter was not trained on."""

    @property
    def verdict(self) -> str:
        """`is_significant` and its direction in words: a higher loss is forgetting."""
        if self.examples < MIN_EXAMPLES:
            return _("too few rows to tell; give a file with more rows")
        if not self.is_significant:
            return _("no significant forgetting")
        if self.difference > 0:
            return _("significant FORGETTING; train for fewer steps or lower training.learning_rate to reduce it")
        return _("no forgetting: significantly better")


@dataclass(frozen=True)
class AdapterEvaluation:
    """One adapter against the base model.

    scores: empty if no answers were generated; forgotten: None if forgetting was not evaluated.
    """

    name: str
    folder: str
    loss: Comparison
    scores: tuple[MetricComparison, ...]
    forgotten: Forgetting | None


@dataclass(frozen=True)
class ComparedAnswers:
    """A prompt, its reference answer, and the answers of the base model and of each adapter."""

    prompt: str
    reference: str
    source: str
    base: Answer
    adapters: tuple[Answer, ...]

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The base model's answer, then the adapters'."""
        return self.base, *self.adapters


class ResultLine(NamedTuple):
    """One metric of the base model or of an adapter, as text.

    Only `value` is set for the base model, and for perplexities, which have no interval of their own.
    """

    who: str
    value: str
    difference: str = ""
    interval: str = ""
    significance: str = ""
    verdict: str = ""
    tone: str = ""  # 'good' or 'bad' if the difference is significant


class ResultGroup(NamedTuple):
    """One metric: the line of the base model, and one for each adapter."""

    name: str
    lines: list[ResultLine]


@dataclass(frozen=True)
class Evaluation:
    """Adapters evaluated against one base model.

    data: the files of the examples; forget_data: the file on which `forgotten` was evaluated, None if it was not.
    """

    base: str
    data: tuple[str, ...]
    forget_data: str | None
    adapters: tuple[AdapterEvaluation, ...]
    samples: tuple[ComparedAnswers, ...]

    def groups(self) -> Iterator[ResultGroup]:
        """Every metric with its intervals and verdicts: loss, perplexity, scores, forgetting."""
        losses = [adapter.loss for adapter in self.adapters]
        on_preferences = isinstance(losses[0], PreferenceComparison)
        yield self._group(_("held-out preference loss") if on_preferences else _("held-out loss"), losses, 4)
        if not on_preferences:
            values = [losses[0].before, *(loss.after for loss in losses)]
            lines = [ResultLine(who, f"{perplexity(value):.1f}") for who, value in zip(self.names, values, strict=True)]
            yield ResultGroup(_("perplexity"), lines)
        for scores in zip(*(adapter.scores for adapter in self.adapters), strict=True):
            yield self._group(scores[0].name, scores, scores[0].digits)
        forgotten = [adapter.forgotten for adapter in self.adapters if adapter.forgotten]
        if forgotten:
            yield self._group(_("loss on {file}", file=Path(self.forget_data or "").name), forgotten, 4)

    def verdicts(self) -> list[str]:
        """The verdicts on each adapter in words, one sentence for all metrics with the same verdict."""
        metrics: dict[tuple[str, str], list[str]] = {}
        for group in self.groups():
            for line in group.lines[1:]:
                if line.verdict:
                    metrics.setdefault((line.who, line.verdict), []).append(group.name)
        return [
            _("{name}: {measures}: {verdict}", name=name, measures=listed(measures), verdict=verdict)
            for name in self.names[1:]
            for (who, verdict), measures in metrics.items()
            if who == name
        ]

    @property
    def names(self) -> list[str]:
        """Names of the base model and the adapters, in the order of the lines of a group."""
        return [_("base"), *(adapter.name for adapter in self.adapters)]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON. The first adapter's loss is also at the top level, for scripts with one adapter."""
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

    def _group(self, name: str, comparisons: Sequence[Comparison], digits: int) -> ResultGroup:
        lines = [ResultLine(_("base"), f"{comparisons[0].before:.{digits}f}")]
        for adapter, one in zip(self.adapters, comparisons, strict=True):
            span = f"[{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
            texts = f"{one.after:.{digits}f}", f"{one.difference:+.{digits}f}", span
            is_better = (one.difference > 0) == isinstance(one, MetricComparison)
            tone = "" if not one.is_significant else "good" if is_better else "bad"
            lines.append(ResultLine(adapter.name, *texts, _significance(one, is_better), one.verdict, tone))
        return ResultGroup(name, lines)


def _significance(comparison: Comparison, is_better: bool) -> str:
    """The verdict in a word or two, for a narrow column."""
    if comparison.examples < MIN_EXAMPLES:
        return _("too few")
    if not comparison.is_significant:
        return _("no")
    return _("yes, better") if is_better else _("yes, WORSE")


def _plain(comparison: Comparison) -> dict[str, Any]:
    values = {key: value for key, value in asdict(comparison).items() if key not in ("key", "digits")}
    return {
        **values,
        "difference": comparison.difference,
        "is_real": comparison.is_significant,
        "verdict": comparison.verdict,
    }
