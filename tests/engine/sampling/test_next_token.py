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


def test_not_a_number_is_said() -> None:
    with pytest.raises(ModelError, match="NaN"):
        next_tokens(torch.tensor([[0.0, float("nan"), 1.0]]), [running_request([1])])
