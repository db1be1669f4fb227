"""How near replies come to known answers: exact match, F1, chrF, BLEU, ROUGE-L, and whether a difference is real.

sacrebleu and rouge-score compute. Chinese and Japanese characters count one by one, other text by words. All are from
0 to 100.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.errors import MissingExtraError
from lorasmith.evaluation.loss import FEWEST, Comparison, draws_of, interval
from lorasmith.i18n import _

HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORD = re.compile(rf"[{HAN_KANA}]|[^\W{HAN_KANA}]+")


@dataclass(frozen=True)
class Metric:
    """Higher is better. `of` gives numbers of one (reply, reference); `total` makes a figure of their sums.

    So a figure is that of all examples together, and that of any draw of them costs a sum.
    """

    key: str
    name: str
    of: Callable[[str, str], Sequence[float]]
    total: Callable[[Sequence[float]], float]
    digits: int = 1  # behind the point, for a reader


@dataclass(frozen=True)
class Scored(Comparison):
    """A metric's figure of the base and of an adapter on the same questions, and the interval of their difference."""

    key: str = ""
    name: str = ""
    digits: int = 1

    @property
    def verdict(self) -> str:
        """The same in words."""
        if self.examples < FEWEST:
            return _("too few answers to tell; request more with --generate")
        if not self.is_real:
            return _("no significant difference")
        return _("significantly better") if self.difference > 0 else _("significantly WORSE than the base model")


def words(text: str) -> list[str]:
    """Words in lower case; each Chinese or Japanese character is one."""
    return WORD.findall(text.lower())


def require_extra() -> None:
    """Raises MissingExtraError where sacrebleu or rouge-score is not installed."""
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


def built_in(references: Sequence[str]) -> list[Metric]:
    """Every metric of this module. Raises MissingExtraError.

    BLEU takes Chinese characters one by one if a reference holds any, and other text as its 13a tokenizer does.
    """
    require_extra()
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    return [
        mean("exact", _("exact match"), _exact),
        mean("f1", "F1", _f1),
        mean("chrf", "chrF", lambda reply, reference: chrf.sentence_score(reply, [reference]).score),
        _bleu("zh" if any(map(HAN.search, references)) else "13a"),
        _rouge_l(),
    ]


def mean(key: str, name: str, score: Callable[[str, str], float], digits: int = 1) -> Metric:
    """A metric whose figure is the mean of its examples' scores."""

    def of(reply: str, reference: str) -> tuple[float, float]:
        return score(reply, reference), 1.0

    return Metric(key, name, of, lambda sums: sums[0] / sums[1], digits)


def score(metric: Metric, replies: Sequence[str], references: Sequence[str]) -> Tensor:
    """(examples, numbers): the metric's numbers of each reply, float64."""
    rows = [metric.of(reply, reference) for reply, reference in zip(replies, references, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def compare_scores(metric: Metric, before: Tensor, after: Tensor, seed: int = 0) -> Scored:
    """Paired bootstrap of the figure's difference over the draws that `evaluate.compare` takes for the loss."""
    draws = draws_of(len(before), seed)
    totals = [[metric.total(sums) for sums in scores[draws].sum(1).tolist()] for scores in (before, after)]
    low, high = interval(torch.tensor(totals[1], dtype=torch.float64) - torch.tensor(totals[0], dtype=torch.float64))
    figures = [metric.total(scores.sum(0).tolist()) for scores in (before, after)]
    return Scored(figures[0], figures[1], low, high, len(before), metric.key, metric.name, metric.digits)


def _exact(reply: str, reference: str) -> float:
    """Whether they are equal, but for blanks."""
    return 100.0 * (reply.split() == reference.split())


def _f1(reply: str, reference: str) -> float:
    """Of the words of both, however ordered (Rajpurkar 2016); texts without any must be equal."""
    said, wanted = Counter(words(reply)), Counter(words(reference))
    if not said or not wanted:
        return _exact(reply, reference)
    return 200.0 * (said & wanted).total() / (said.total() + wanted.total())


def _bleu(tokenizer: str) -> Metric:
    """Of all examples together (Papineni 2002): n-grams of one to four words are counted, then compared once."""
    from sacrebleu.metrics.bleu import BLEU

    # The figure is without effective order; this only says that single sentences are meant to be scored.
    bleu = BLEU(tokenize=tokenizer, effective_order=True)

    def counts(reply: str, reference: str) -> list[float]:
        found = bleu.sentence_score(reply, [reference])
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def total(sums: Sequence[float]) -> float:
        said, wanted, *grams = (int(number) for number in sums)
        return BLEU.compute_bleu(grams[:4], grams[4:], said, wanted, smooth_method="exp").score

    return Metric("bleu", "BLEU", counts, total)


def _rouge_l() -> Metric:
    """The F measure of the longest common subsequence of words (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return mean("rouge_l", "ROUGE-L", lambda reply, wanted: 100.0 * scorer.score(wanted, reply)["rougeL"].fmeasure)


class _Words:
    """What rouge-score asks of a tokenizer: its own knows only the letters a to z."""

    def tokenize(self, text: str) -> list[str]:
        """See `words`."""
        return words(text)
