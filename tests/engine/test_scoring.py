"""Log probabilities of prompts against transformers' own logits, each prompt alone."""

from dataclasses import replace

import pytest
import torch

from lorasmith.engine.engine import Engine, generate
from lorasmith.engine.scoring import BATCH_TOKENS, PromptScoring, prompt_batches, prompt_logprobs
from lorasmith.errors import DataError
from lorasmith.model.base import Base, Head
from tests.support.decoding import base_of, prompts, request
from tests.support.families import own_logits


def check_all(base: Base) -> None:
    """Two share a long beginning; lengths, adapters and tops are mixed; one has a single token."""
    first, *others = prompts(20, 1, 12, 7, 3)
    texts = [first, [*first[:15], 9, 8, 7], *others]
    asked = [
        request(ids, (None, "a0", "a1")[i % 3], logprobs=(1, 0, 4)[i % 3]) for i, ids in enumerate([*texts, first])
    ]
    asked.append(request(first[:18], None))  # logprobs not asked for
    found = prompt_logprobs(base, asked)
    assert base.router.slices is None
    for one, own in zip(asked, found, strict=True):
        base.router.active = one.adapter
        with torch.no_grad():
            expected = own_logits(base, torch.tensor([one.ids]))[0].log_softmax(-1)
        assert own[0] is None
        assert len(own) == len(one.ids)
        for row, token, told in zip(expected, one.ids[1:], own[1:], strict=False):
            assert told is not None
            assert told.logprob == pytest.approx(float(row[token]), abs=1e-4)  # rounding of random models
            best = row.topk(one.sampling.logprobs or 0)
            assert [k for k, _ in told.top] == best.indices.tolist()
            assert [p for _, p in told.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_prompts_are_scored_as_transformers_would(family: str, direct: bool) -> None:
    base = base_of(family, adapters=2)
    base.head = base.head if direct else Head(direct=False)
    check_all(base)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "cohere"])  # caps and scales of the head
def test_heads_of_other_families(family: str) -> None:
    check_all(base_of(family, adapters=2))


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.engine.scoring.BATCH_TOKENS", 20)
    monkeypatch.setattr("lorasmith.model.head.CHUNK", 4)
    check_all(base_of("llama", adapters=2))


@pytest.mark.parametrize("chunk", [3, 19])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_a_long_prompt_is_scored_in_chunks_with_the_same_numbers(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(family, adapters=2)
    Engine(base)  # with an engine, as in a server, there is a KV cache
    monkeypatch.setattr("lorasmith.engine.scoring.CHUNK_TOKENS", chunk)
    monkeypatch.setattr("lorasmith.engine.scoring.BATCH_TOKENS", 1)
    check_all(base)


@pytest.mark.parametrize("direct", [True, False])
def test_a_running_reply_goes_on_between_the_chunks(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.engine.scoring.CHUNK_TOKENS", 8)
    monkeypatch.setattr("lorasmith.engine.scoring.BATCH_TOKENS", 8)
    base, (long, short) = base_of("llama", adapters=2), prompts(33, 6)
    base.head = base.head if direct else Head(direct=False)
    (whole,) = prompt_logprobs(base, [request(long, "a1", logprobs=2)])
    engine = Engine(base)
    events = list(generate(engine, [request(short, "a0", stop=False)]))
    scoring, beside = PromptScoring(base, [request(long, "a1", logprobs=2)]), []
    engine.add(request(short, "a0", stop=False))
    for scored in (9, 17, 25, 33):
        assert scoring.step()
        assert len(scoring.scores[0]) == scored
        beside += engine.step()
    assert not scoring.step()
    while engine.busy:
        beside += engine.step()
    assert [event.token for event in beside] == [event.token for event in events]
    for one, other in zip(scoring.scores[0][1:], whole[1:], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _logprob in one.top] == [token for token, _logprob in other.top]


def test_requests_that_run_are_not_disturbed() -> None:
    base, ids = base_of("llama", adapters=1), prompts(6)[0]
    engine = Engine(base)
    engine.add(request(ids, "a0", stop=False))
    events = engine.step()
    prompt_logprobs(base, [request(ids, None)])
    while engine.busy:
        events += engine.step()
    alone = Engine(base)
    alone.add(request(ids, "a0", stop=False))
    expected = []
    while alone.busy:
        expected += alone.step()
    assert events == expected


def test_too_long_is_refused() -> None:
    base = base_of("llama")
    full = request(prompts(64)[0])
    assert len(prompt_logprobs(base, [full])[0]) == 64
    with pytest.raises(DataError, match="65 tokens"):
        prompt_logprobs(base, [full, replace(full, ids=[*full.ids, 5])])
    assert prompt_logprobs(base, []) == []


def test_prompts_are_scored_in_rows():
    long, short = [1] * (BATCH_TOKENS - 1), [1, 2]
    assert list(prompt_batches(list(map(len, [short, short, long, short])))) == [[0, 1], [2], [3]]
