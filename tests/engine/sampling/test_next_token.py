"""Greedy and sampled requests beside each other, and logits that are NaN."""

import pytest
import torch

from lorasmith.engine.sampling.next_token import next_tokens
from lorasmith.errors import ModelError
from tests.support.decoding import running_request


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    logits = torch.randn(3, 40)
    runs = [running_request([1]), running_request([1], temperature=5.0), running_request([1], top_p=0.1, top_k=3)]
    found = next_tokens(logits.clone(), runs)
    assert [found[0], found[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_no_temperature_is_the_limit_of_a_small_one() -> None:
    logits = torch.randn(1, 40)
    assert next_tokens(logits.clone(), [running_request([1], temperature=1e-4)]) == [int(logits.argmax())]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e6])
def test_extreme_temperatures_are_numbers(temperature: float) -> None:
    logits = 50 * torch.randn(1, 40)
    assert 0 <= next_tokens(logits.clone(), [running_request([1], temperature=temperature)])[0] < 40


def test_a_bias_is_added_to_its_tokens_of_its_row_only() -> None:
    logits = torch.randn(3, 40)
    bias = {7: 100.0, int(logits[2].argmax()): -100.0}
    runs = [running_request([1]), running_request([1], logit_bias={7: 100.0}), running_request([1], logit_bias=bias)]
    for run in runs:
        assert run.request.sampling.logprobs is None
    assert next_tokens(logits.clone(), runs) == [int(logits[0].argmax()), 7, 7]
    bans = dict.fromkeys(range(39), -100.0)
    drawn = [running_request([1], logit_bias=bans, temperature=1.0, seed=seed) for seed in range(20)]
    assert next_tokens(logits[:1].repeat(20, 1), drawn) == [39] * 20
    told = running_request([1], logit_bias={7: 100.0}, logprobs=1)
    next_tokens(logits[:1].clone(), [told])
    assert told.logprobs.logprob == pytest.approx(float(logits[0].log_softmax(-1)[7]))  # the model's own


def test_not_a_number_is_said() -> None:
    with pytest.raises(ModelError, match="NaN"):
        next_tokens(torch.tensor([[0.0, float("nan"), 1.0]]), [running_request([1])])
