"""Each rule against transformers' processor of the same name; what is drawn against its probabilities."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.engine import Engine
from lorasmith.engine.sampling import sample as sampling
from lorasmith.engine.sampling.penalty import PenalizedRow, TokenCounts, apply_penalties
from lorasmith.engine.sampling.sample import Rules, filter_probabilities, sample
from tests.support.decoding import base_of, drain, prompts, request, run, running_request

CPU = torch.device("cpu")


def rules_of(*settings: dict[str, float], place: int = 0) -> Rules:
    return Rules.of([SamplingConfig.model_validate(one) for one in settings], [place] * len(settings), CPU)


def kept(logits: Tensor, rules: Rules) -> Tensor:
    """Probabilities [N, V] after the rules, each row adding up to 1."""
    found = (logits / rules.temperature_D1).softmax(-1).sort(descending=True)
    rest = torch.zeros_like(logits).scatter(1, found.indices, filter_probabilities(found.values, rules))
    return rest / rest.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bfloat16 many are equally likely
def test_top_k_is_transformers(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 300).to(dtype).float()
    sizes = [0, 1, 2, 50, 299, 4000]
    found = kept(logits, rules_of(*({"temperature": 1, "top_k": k} for k in sizes)))
    for row, k, ours in zip(logits, sizes, found, strict=True):
        expected = TopKLogitsWarper(k)(None, row[None].clone())[0] if k else row  # type: ignore[arg-type]
        torch.testing.assert_close(ours, expected.softmax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 40])
def test_top_p_and_min_p_are_transformers(top_k: int, temperature: float) -> None:
    shares = [(p, m) for p in (0.001, 0.1, 0.5, 0.9, 0.9999, 1.0) for m in (0.0, 0.02, 0.3, 1.0)]
    logits = 2 * torch.randn(len(shares), 300)
    found = kept(
        logits, rules_of(*({"temperature": temperature, "top_k": top_k, "top_p": p, "min_p": m} for p, m in shares))
    )
    for row, (p, m), ours in zip(logits, shares, found, strict=True):
        theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        theirs += [TopKLogitsWarper(top_k)] if top_k else []
        theirs += [TopPLogitsWarper(p), MinPLogitsWarper(m)]
        expected = theirs(None, row[None].clone())[0]  # type: ignore[arg-type]
        torch.testing.assert_close(ours, expected.softmax(-1))


def test_top_p_keeps_words_as_likely_as_the_last() -> None:
    """Which of them a sort puts first is chance; transformers keeps some, we filter_probabilities all."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, -9.0]])
    assert (kept(logits, rules_of({"top_p": 0.3}))[0] > 0).tolist() == [True, True, True, True, False]


def test_few_candidates_draw_what_all_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first look holds too little it is widened; the noise is each token's own."""
    logits = torch.randn(4, 300)
    for place in range(40):
        settings = ({"top_p": 0.9}, {"top_k": 3}, {"top_k": 50, "top_p": 0.99}, {"min_p": 0.01})
        rules = rules_of(*({"temperature": 1.0, "seed": place} | one for one in settings), place=place)
        monkeypatch.setattr(sampling, "FIRST_CANDIDATES", 300)
        expected = sample(logits, rules)
        monkeypatch.setattr(sampling, "FIRST_CANDIDATES", 4)
        assert torch.equal(sample(logits, rules), expected)


@pytest.mark.parametrize("look", [128, 3])  # 3: the other nine run as one
@pytest.mark.parametrize("rules", [{}, {"top_k": 8}, {"min_p": 0.05}])
def test_drawn_as_often_as_likely(rules: dict[str, float], look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi squared over 12 words, 11 degrees of freedom: above 31.3 once in a thousand seeds."""
    monkeypatch.setattr(sampling, "FIRST_CANDIDATES", look)
    logits, n, settings = torch.randn(1, 12), 8000, {"temperature": 0.7} | rules
    many = [SamplingConfig.model_validate(settings | {"seed": seed}) for seed in range(80)]
    drawn = Rules.of([one for one in many for _ in range(n // 80)], list(range(n // 80)) * 80, CPU)
    counts = torch.bincount(sample(logits.expand(n, -1), drawn), minlength=12)
    expected = kept(logits, rules_of(settings))[0] * n
    is_kept = expected > 0
    assert counts[~is_kept].sum() == 0
    assert float(((counts - expected)[is_kept] ** 2 / expected[is_kept]).sum()) < 31.3


def test_neighboring_places_and_seeds_draw_independently() -> None:
    """Of 2,000 pairs of draws from four equal words a quarter is equal: within four deviations."""
    logits = torch.zeros(1, 4)
    for step in ((1, 0), (0, 1)):
        tokens = [
            int(sample(logits, rules_of({"temperature": 1.0, "seed": 7 + i * step[0]}, place=i * step[1])))
            for i in range(2001)
        ]
        assert abs(sum(a == b for a, b in pairwise(tokens)) - 500) < 4 * (2000 * 3 / 16) ** 0.5


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e300}, {"top_k": 10**30}, {"repetition_penalty": 1e-50}, {"repetition_penalty": 1e50}],
)
def test_settings_beyond_what_a_tensor_holds_draw_no_barred_token(settings: dict[str, float]) -> None:
    """As JSON mode bars them. The prompt holds every word, so that all are penalized."""
    for seed in range(20):
        logits, barred = 5 * torch.randn(1, 40), torch.arange(40) > 2
        one = running_request(list(range(40)), **({"temperature": 1.0, "seed": seed} | settings))
        apply_penalties(logits, [PenalizedRow(0, TokenCounts(range(40)), one.request.sampling)])
        assert logits.isfinite().all()
        assert int(sample(logits.masked_fill(barred, -torch.inf), Rules.of([one.request.sampling], [0], CPU))) < 3


SEEDED = {
    "temperature": 1.3, "top_p": 0.95, "top_k": 60, "min_p": 0.005, "repetition_penalty": 1.2, "presence_penalty": 0.3,
    "frequency_penalty": -0.2, "logprobs": 2, "stop": False,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_seeded_sample_does_not_depend_on_the_load(family: str) -> None:
    """Alone, and beside fifteen others that come at other times, with other rules and adapters."""
    base = base_of(family, adapters=2)
    lengths = (4, 9, 4, 15, 1, 6, 12, 3, 20, 2, 5, 7, 8, 11, 10, 13)
    asked = [
        request(ids, (None, "a0", "a1")[i % 3], seed=i, **(SEEDED if i % 4 else {"temperature": 1.0, "stop": False}))  # type: ignore[arg-type]
        for i, ids in enumerate(prompts(*lengths))
    ]
    alone = [run(Engine(base), [one])[0] for one in asked]
    engine = Engine(base, slots=7, tokens=9)
    found: dict[int, list[int]] = {}
    for i, one in enumerate(asked):
        engine.add(one)
        for event in engine.step() if i % 3 else []:
            found.setdefault(event.key, []).append(event.token)
    for event in drain(engine):
        found.setdefault(event.key, []).append(event.token)
    assert [found[i] for i in range(16)] == alone
    assert run(Engine(base), asked[::-1])[::-1] == alone
    assert len({tuple(ids) for ids in alone}) == 16


def test_the_seed_decides() -> None:
    base, ids = base_of("llama"), prompts(4)[0]
    first, same, other = (
        run(Engine(base), [request(ids, temperature=1.5, seed=seed, stop=False)])[0] for seed in (1, 1, 2)
    )
    assert first == same != other
