"""Greedy and sampled requests beside each other, and logits that are NaN."""

import pytest
import torch

from lorasmith.config.sampling import Sampling
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


# A value of each parameter under which other tokens are sampled than without it, at temperature 1.
CHANGES = {
    "temperature": 0.3, "top_p": 0.3, "top_k": 2, "min_p": 0.5, "repetition_penalty": 5.0, "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", Sampling.model_fields)
def test_every_parameter_changes_what_is_sampled(name: str) -> None:
    """The API and the command line offer whatever config/sampling.py defines, so nothing there may do nothing."""
    assert name in CHANGES, f"{name} has no value here: show that it changes something, or take it out"
    logits = torch.randn(1, 50).expand(64, -1)

    def tokens(**settings: float) -> list[int]:
        rows = [running_request([1, 2, 3], **{"temperature": 1.0, "seed": seed} | settings) for seed in range(64)]
        for row in rows:
            for token in range(25):
                if row.token_counts is not None:
                    row.token_counts.add(token)
        return next_tokens(logits.clone(), rows)

    assert tokens(**{name: CHANGES[name]}) != tokens()
