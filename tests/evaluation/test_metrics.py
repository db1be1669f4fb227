"""Metrics against sacrebleu's and rouge-score's own corpora, a count by hand, and the bootstrap of the loss."""

import sys

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from lorasmith.errors import MissingExtraError
from lorasmith.evaluation.loss import ExampleLosses, bootstrap_indices, compare
from lorasmith.evaluation.metrics import (
    MetricComparison,
    answer_statistics,
    built_in_metrics,
    compare_metric,
    mean_metric,
    words,
)

ENGLISH = (
    ("Cats eat mice, fish and what they find.", "Cats eat mice and what they find in the kitchen."),
    ("The air scatters blue light most of all.", "Because the air scatters blue light most."),
    ("No.", "No."),
    ("", "Say something short."),
)
CHINESE = (
    ("先做会做的题，然后检查一遍。", "先做会做的题，再检查一遍。"),
    ("早睡早起身体会很好", "早睡早起身体好。"),
    ("用 Python 写", "用 Python 语言写"),
)


def figures(pairs, replies=None):
    """Each metric's figure over (reply, reference) pairs."""
    references = [reference for _reply, reference in pairs]
    return {
        metric.key: metric.aggregate(
            answer_statistics(metric, replies or [reply for reply, _r in pairs], references).sum(0).tolist()
        )
        for metric in built_in_metrics(references)
    }


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")], ids=["en", "zh"])
def test_bleu_and_chrf_are_sacrebleus(pairs, tokenizer):
    replies, references = zip(*pairs, strict=True)
    found = figures(pairs)
    assert found["bleu"] == pytest.approx(BLEU(tokenize=tokenizer).corpus_score(replies, [references]).score)
    sentences = [CHRF().sentence_score(reply, [reference]).score for reply, reference in pairs]
    assert found["chrf"] == pytest.approx(sum(sentences) / len(pairs))
    assert found["bleu"] > 20


def test_english_rouge_is_rouge_scores_own():
    scorer = RougeScorer(["rougeL"])
    wanted = [scorer.score(reference, reply)["rougeL"].fmeasure for reply, reference in ENGLISH]
    assert figures(ENGLISH)["rouge_l"] == pytest.approx(100 * sum(wanted) / len(ENGLISH))


def test_chinese_is_counted_by_characters():
    """早睡早起身体 and 好 are a common subsequence of 7 of the reply's 9 and the reference's 7 characters."""
    assert figures(CHINESE[1:2])["rouge_l"] == pytest.approx(200 * 7 / 16)
    assert figures([("气天好", "好天气")])["f1"] == 100
    assert figures([("气天好", "好天气")])["rouge_l"] == pytest.approx(100 / 3)
    assert words("用Python3写，好！") == ["用", "python3", "写", "好"]


def test_f1_and_exact_match_by_hand():
    assert figures([("a b b c", "b b d")])["f1"] == pytest.approx(200 * 2 / 7)
    assert figures([("B, a!", "a b")]) | {"f1": 100, "exact": 0} == figures([("B, a!", "a b")])
    assert figures([("yes ", " yes"), ("no", "yes")])["exact"] == 50
    assert figures([("", "?"), ("?", "?")])["f1"] == 50  # no word in either: as exact match has it


def test_a_draws_figure_is_that_of_the_drawn_texts():
    replies, references = zip(*ENGLISH, strict=True)
    bleu = next(metric for metric in built_in_metrics(references) if metric.key == "bleu")
    counts = answer_statistics(bleu, replies, references)
    for resample in bootstrap_indices(len(ENGLISH), 0)[:50].tolist():
        drawn = BLEU().corpus_score([replies[i] for i in resample], [[references[i] for i in resample]])
        assert bleu.aggregate(counts[resample].sum(0).tolist()) == pytest.approx(drawn.score)


def test_the_interval_of_a_mean_is_that_of_a_loss_with_equal_weights():
    before, after = torch.rand(2, 30, dtype=torch.float64)
    ones = torch.ones(30, dtype=torch.float64)
    loss = compare(ExampleLosses(before, ones), ExampleLosses(after, ones), 7)
    metric = mean_metric("m", "m", lambda reply, reference: 0.0)
    found = compare_metric(metric, torch.stack([before, ones], 1), torch.stack([after, ones], 1), 7)
    assert (found.low, found.high, found.difference) == pytest.approx((loss.low, loss.high, loss.difference))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((1.0, 2.0, 0.5, 1.5, 10), "significantly better"),
        ((2.0, 1.0, -1.5, -0.5, 10), "significantly WORSE than the base model"),
        ((1.0, 2.0, 0.0, 1.5, 10), "no significant difference"),
        ((1.0, 2.0, 0.5, 1.5, 9), "too few answers to tell; request more with --generate"),
    ],
)
def test_whether_it_is_real_in_words(numbers, text):
    assert MetricComparison(*numbers).verdict == text


@pytest.mark.parametrize("name", ["sacrebleu", "rouge_score"])
def test_without_the_extra_it_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingExtraError, match=rf"{name} is not installed\. Install it with: pip install 'lorasmith\[eval\]'"
    ):
        built_in_metrics(["x"])
