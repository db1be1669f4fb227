"""Logprobs are those of the model's own distribution, whatever is sampled."""

import pytest
import torch

from lorasmith.engine.engine import Engine
from lorasmith.engine.sampling.logprobs import logprobs_of
from lorasmith.engine.sampling.next_token import next_tokens
from tests.support.decoding import base_of, drain, prompts, request, running_request
from tests.support.families import logits_of


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Before penalty and temperature; the likeliest as many as each request asks."""
    logits = 3 * torch.randn(4, 40)
    runs = [
        running_request([1, 2], logprobs=3, temperature=2.0, repetition_penalty=9.0, seed=1),
        running_request([1]),
        running_request([1], logprobs=0),
        running_request([1], logprobs=20, top_k=1, temperature=0.1),
    ]
    tokens = next_tokens(logits.clone(), runs)
    for own, token, one in zip(logits.log_softmax(-1), tokens, runs, strict=True):
        asked = one.request.sampling.logprobs
        if asked is None:
            assert one.logprobs is None
            continue
        assert one.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(float(own[token]), abs=1e-6)
        best = own.topk(asked)
        assert [k for k, _ in one.logprobs.top] == best.indices.tolist()
        assert [p for _, p in one.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_more_likeliest_than_words() -> None:
    (told,) = logprobs_of(torch.zeros(1, 3), [1], [20])
    assert len(told.top) == 3


def test_events_carry_logprobs_of_the_logits_that_chose() -> None:
    base, ids = base_of("llama"), prompts(5)[0]
    engine = Engine(base)
    engine.add(request(ids, logprobs=2, max_new_tokens=6))
    engine.add(request(ids, max_new_tokens=3))
    events = drain(engine)
    own = [event for event in events if event.key == 0]
    tokens = [event.token for event in own]
    logits = logits_of(base, torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1]
    for event, row in zip(own, logits.log_softmax(-1), strict=True):
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        assert event.logprobs.top[0] == (event.token, event.logprobs.logprob)  # greedy
    assert all(event.logprobs is None for event in events if event.key == 1)
