"""Metrics that compare generated answers with references: exact match, F1, chrF, BLEU and ROUGE-L, from 0 to 100.

BLEU and chrF are computed by sacrebleu, ROUGE-L by rouge-score. F1 and ROUGE-L take each Chinese or Japanese character
as a word. `compare_metric` tells by a paired bootstrap whether two scores differ.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.errors import MissingExtraError
from lorasmith.evaluation.loss import MIN_EXAMPLES, Comparison, bootstrap_indices, confidence_interval
from lorasmith.i18n import _

HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORD = re.compile(rf"[{HAN_KANA}]|[^\W{HAN_KANA}]+")


@dataclass(frozen=True)
class Metric:
    """A score for which higher is better.

    `statistics` of one (answer, reference) pair are added up over the pairs, and `aggregate` turns the sums into the
    score. So a corpus metric such as BLEU is computed over all pairs together, and the score of a resample costs a sum.
    """

    key: str
    name: str
    statistics: Callable[[str, str], Sequence[float]]
    aggregate: Callable[[Sequence[float]], float]
    digits: int = 1  # decimal places when displayed


@dataclass(frozen=True)
class MetricComparison(Comparison):
    """The scores of the base model and of an adapter on the same prompts, and the interval of their difference."""

    key: str = ""
    name: str = ""
    digits: int = 1

    @property
    def verdict(self) -> str:
        """`is_significant` and its direction in words; higher is better."""
        if self.examples < MIN_EXAMPLES:
            return _("too few answers to tell; request more with --generate")
        if not self.is_significant:
            return _("no significant difference")
        return _("significantly better") if self.difference > 0 else _("significantly WORSE than the base model")


def words(text: str) -> list[str]:
    """The words of `text` in lower case; each Chinese or Japanese character is a word."""
    return WORD.findall(text.lower())


def require_eval_extra() -> None:
    """Raise MissingExtraError if sacrebleu or rouge-score is not installed."""
    try:
        import rouge_score
        import sacrebleu
    except ImportError as error:
        raise MissingExtraError(
            _(
                "--generate scores answers with sacrebleu and rouge-score, but {name} is not installed. "
                "Install it with: pip install 'lorasmith[eval]'",
                name=error.name,
            )
        ) from error
    del rouge_score, sacrebleu


def built_in_metrics(references: Sequence[str]) -> list[Metric]:
    """All metrics of this module. Raises MissingExtraError if sacrebleu or rouge-score is not installed.

    BLEU uses sacrebleu's `zh` tokenizer if any reference contains Chinese characters, and its default `13a` otherwise.
    """
    require_eval_extra()
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    return [
        mean_metric("exact", _("exact match"), _exact),
        mean_metric("f1", "F1", _f1),
        mean_metric("chrf", "chrF", lambda answer, reference: chrf.sentence_score(answer, [reference]).score),
        _bleu("zh" if any(map(HAN.search, references)) else "13a"),
        _rouge_l(),
    ]


def mean_metric(key: str, name: str, score: Callable[[str, str], float], digits: int = 1) -> Metric:
    """A metric that is the mean of `score` over the answers."""

    def statistics(answer: str, reference: str) -> tuple[float, float]:
        return score(answer, reference), 1.0

    return Metric(key, name, statistics, lambda sums: sums[0] / sums[1], digits)


def answer_statistics(metric: Metric, answers: Sequence[str], references: Sequence[str]) -> Tensor:
    """The metric's statistics of each answer, float64 of shape (answers, statistics)."""
    rows = [metric.statistics(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def compare_metric(metric: Metric, before: Tensor, after: Tensor, seed: int = 0) -> MetricComparison:
    """Paired bootstrap of the difference in score, over the same resamples that `loss.compare` takes.

    before, after: the `answer_statistics` of both on the same prompts.
    """
    resamples = bootstrap_indices(len(before), seed)
    scores = [
        torch.tensor([metric.aggregate(sums) for sums in statistics[resamples].sum(1).tolist()], dtype=torch.float64)
        for statistics in (before, after)
    ]
    low, high = confidence_interval(scores[1] - scores[0])
    first, second = (metric.aggregate(statistics.sum(0).tolist()) for statistics in (before, after))
    return MetricComparison(first, second, low, high, len(before), metric.key, metric.name, metric.digits)


def _exact(answer: str, reference: str) -> float:
    """100 if the texts are equal up to whitespace, else 0."""
    return 100.0 * (answer.split() == reference.split())


def _f1(answer: str, reference: str) -> float:
    """F1 over the bags of words (Rajpurkar 2016); a text without words, such as '?', must match exactly."""
    given, wanted = Counter(words(answer)), Counter(words(reference))
    if not given or not wanted:
        return _exact(answer, reference)
    return 200.0 * (given & wanted).total() / (given.total() + wanted.total())


def _bleu(tokenizer: str) -> Metric:
    """Corpus BLEU (Papineni 2002); its statistics are both lengths and the n-gram counts for n from 1 to 4."""
    from sacrebleu.metrics.bleu import BLEU

    # Only its statistics are used, so effective_order changes no score; without it sacrebleu warns of single sentences.
    bleu = BLEU(tokenize=tokenizer, effective_order=True)

    def statistics(answer: str, reference: str) -> list[float]:
        found = bleu.sentence_score(answer, [reference])
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def aggregate(sums: Sequence[float]) -> float:
        answer_words, reference_words, *ngrams = (int(number) for number in sums)
        return BLEU.compute_bleu(ngrams[:4], ngrams[4:], answer_words, reference_words, smooth_method="exp").score

    return Metric("bleu", "BLEU", statistics, aggregate)


def _rouge_l() -> Metric:
    """F measure of the longest common subsequence of words (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return mean_metric(
        "rouge_l", "ROUGE-L", lambda answer, reference: 100.0 * scorer.score(reference, answer)["rougeL"].fmeasure
    )


class _Words:
    """A tokenizer for rouge-score, whose own one drops everything but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        """See `words`."""
        return words(text)
