"""Each rule against transformers' processor of the same name; what is drawn against its probabilities."""

import pytest
import torch
from decoding import base_of, prompts, request, run
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from lorasmith.engine import sample as rules
from lorasmith.engine.config import SamplingConfig
from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Request, Running
from lorasmith.engine.sample import keep_top_k, keep_top_p, penalise, sample
from lorasmith.engine.text import Stream
from lorasmith.errors import ModelError


def running(ids: list[int], **settings: object) -> Running:
    sampling = SamplingConfig.model_validate(settings)
    generator = torch.Generator().manual_seed(sampling.seed)
    return Running(0, Request(ids, sampling), ids, 99, frozenset(), Stream(None), generator)  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_penalty_is_transformers(penalty: float) -> None:
    logits, ids = torch.randn(50), [3, 7, 7, 3, 49, 0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None].clone())[0]
    penalise(logits, ids, penalty)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 many are equally likely
def test_top_k_is_transformers(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 300).to(dtype).float()
    sizes = [0, 1, 2, 50, 299, 4000]
    found = keep_top_k(logits, sizes)
    for row, k, kept in zip(logits, sizes, found, strict=True):
        expected = TopKLogitsWarper(k)(None, row[None].clone())[0] if k else row  # type: ignore[arg-type]
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("look", [1024, 7])  # 7: the likeliest seven do not hold top_p, so all are sorted
def test_top_p_is_transformers(look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "FIRST_LOOK", look)
    logits = 2 * torch.randn(7, 300)
    shares = [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0]
    found = keep_top_p(logits, shares)
    for row, p, kept in zip(logits, shares, found, strict=True):
        expected = TopPLogitsWarper(p)(None, row[None].clone())[0]  # type: ignore[arg-type]
        assert torch.equal(kept, expected)


def test_top_p_keeps_words_as_likely_as_the_last() -> None:
    """Which of them a sort puts first is chance; transformers keeps some, we keep all."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, -9.0]])
    assert keep_top_p(logits, [0.3]).isfinite().tolist() == [[True, True, True, True, False]]


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    logits = torch.randn(3, 40)
    runs = [running([1]), running([1], temperature=5.0), running([1], top_p=0.1, top_k=3)]
    found = sample(logits.clone(), runs)
    assert [found[0], found[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_no_temperature_is_the_limit_of_a_small_one() -> None:
    logits = torch.randn(1, 40)
    assert sample(logits.clone(), [running([1], temperature=1e-4)]) == [int(logits.argmax())]


def test_drawn_as_often_as_likely() -> None:
    """Chi squared over 12 words, 11 degrees of freedom: above 31.3 once in a thousand seeds."""
    logits, n = torch.randn(1, 12), 4000
    run_ = running([1], temperature=0.7, top_k=8)
    counts = torch.zeros(12)
    for _ in range(n):
        counts[sample(logits.clone(), [run_])[0]] += 1
    expected = keep_top_k(logits / 0.7, [8]).softmax(-1)[0] * n
    drawn = expected > 0
    assert counts[~drawn].sum() == 0
    assert float(((counts - expected)[drawn] ** 2 / expected[drawn]).sum()) < 31.3


def test_not_a_number_is_said() -> None:
    with pytest.raises(ModelError, match="NaN"):
        sample(torch.tensor([[0.0, float("nan"), 1.0]]), [running([1])])


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_seeded_sample_does_not_depend_on_the_load(family: str) -> None:
    base = base_of(family, adapters=2)
    settings = {"temperature": 1.3, "top_p": 0.95, "top_k": 60, "repetition_penalty": 1.2, "stop": False}
    asked = [
        request(ids, name, seed=seed, **settings)  # type: ignore[arg-type]
        for seed, (ids, name) in enumerate(zip(prompts(4, 9, 4, 15, 1, 6), ("a0", None, "a1") * 2, strict=True))
    ]
    alone = [run(Engine(base), [one])[0] for one in asked]
    assert run(Engine(base, slots=3, tokens=5), asked) == alone
    assert run(Engine(base), asked[::-1])[::-1] == alone
    assert len({tuple(ids) for ids in alone}) == 6


def test_the_seed_decides() -> None:
    base, ids = base_of("llama"), prompts(4)[0]
    first, same, other = (
        run(Engine(base), [request(ids, temperature=1.5, seed=seed, stop=False)])[0] for seed in (1, 1, 2)
    )
    assert first == same != other
