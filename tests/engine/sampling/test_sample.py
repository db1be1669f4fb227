"""Each rule against transformers' processor of the same name; what is drawn against its probabilities."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorasmith.config.sampling import Sampling, SamplingConfig
from lorasmith.engine.detokenizer import Detokenizer
from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Request, RunningRequest
from lorasmith.engine.sampling import sample as sampling
from lorasmith.engine.sampling.logprobs import logprobs_of
from lorasmith.engine.sampling.next_token import next_tokens
from lorasmith.engine.sampling.penalty import PenalizedRow, TokenCounts, apply_penalties
from lorasmith.engine.sampling.sample import Rules, filter_probabilities, sample
from lorasmith.errors import ModelError
from tests.support.decoding import base_of, drain, prompts, request, run
from tests.support.families import logits_of

CPU = torch.device("cpu")


def running(ids: list[int], **settings: object) -> RunningRequest:
    request = Request(list(ids), SamplingConfig.model_validate(settings))
    return RunningRequest(0, request, ids, 99, frozenset(), Detokenizer(None))  # type: ignore[arg-type]


def rules_of(*settings: dict[str, float], place: int = 0) -> Rules:
    return Rules.of([SamplingConfig.model_validate(one) for one in settings], [place] * len(settings), CPU)


def kept(logits: Tensor, rules: Rules) -> Tensor:
    """Probabilities [N, V] after the rules, each row adding up to 1."""
    found = (logits / rules.temperature_D1).softmax(-1).sort(descending=True)
    rest = torch.zeros_like(logits).scatter(1, found.indices, filter_probabilities(found.values, rules))
    return rest / rest.sum(-1, keepdim=True)


def test_penalties_are_transformers_and_openais() -> None:
    """Rows of all kinds at once; the reply's tokens came one by one, more than there was room for at first."""
    logits, prompt, reply = torch.randn(4, 300), [3, 7, 7, 3, 299, 0], [5, 7, 5, *range(100, 250), 5]
    seen = TokenCounts(prompt)
    for token in reply:
        seen.add(token)
    settings = [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "presence_penalty": 0.5},
        {"frequency_penalty": -0.25, "presence_penalty": 1.5},
    ]
    found, counts = logits.clone(), torch.bincount(torch.tensor(reply), minlength=300)
    rows = [
        PenalizedRow(i, seen, SamplingConfig.model_validate(one)) for i, one in zip((0, 1, 3), settings, strict=True)
    ]
    apply_penalties(found, rows)
    for i, _seen, own in rows:
        expected = RepetitionPenaltyLogitsProcessor(own.repetition_penalty)(
            torch.tensor([prompt + reply]), logits[i : i + 1].clone()
        )[0]
        expected -= own.frequency_penalty * counts + own.presence_penalty * (counts > 0)
        torch.testing.assert_close(found[i], expected)
    assert torch.equal(found[2], logits[2])


def test_a_neutral_penalty_changes_no_bit() -> None:
    logits = torch.randn(1, 50)
    found = logits.clone()
    apply_penalties(found, [PenalizedRow(0, TokenCounts([1, 2, 3]), SamplingConfig())])
    assert torch.equal(found, logits)


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


def test_neighbouring_places_and_seeds_draw_independently() -> None:
    """Of 2,000 pairs of draws from four equal words a quarter is equal: within four deviations."""
    logits = torch.zeros(1, 4)
    for step in ((1, 0), (0, 1)):
        tokens = [
            int(sample(logits, rules_of({"temperature": 1.0, "seed": 7 + i * step[0]}, place=i * step[1])))
            for i in range(2001)
        ]
        assert abs(sum(a == b for a, b in pairwise(tokens)) - 500) < 4 * (2000 * 3 / 16) ** 0.5


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    logits = torch.randn(3, 40)
    runs = [running([1]), running([1], temperature=5.0), running([1], top_p=0.1, top_k=3)]
    found = next_tokens(logits.clone(), runs)
    assert [found[0], found[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_no_temperature_is_the_limit_of_a_small_one() -> None:
    logits = torch.randn(1, 40)
    assert next_tokens(logits.clone(), [running([1], temperature=1e-4)]) == [int(logits.argmax())]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e6])
def test_extreme_temperatures_are_numbers(temperature: float) -> None:
    logits = 50 * torch.randn(1, 40)
    assert 0 <= next_tokens(logits.clone(), [running([1], temperature=temperature)])[0] < 40


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e300}, {"top_k": 10**30}, {"repetition_penalty": 1e-50}, {"repetition_penalty": 1e50}],
)
def test_settings_beyond_what_a_tensor_holds_draw_no_barred_token(settings: dict[str, float]) -> None:
    """As JSON mode bars them. The prompt holds every word, so that all are penalised."""
    for seed in range(20):
        logits, barred = 5 * torch.randn(1, 40), torch.arange(40) > 2
        one = running(list(range(40)), **({"temperature": 1.0, "seed": seed} | settings))
        apply_penalties(logits, [PenalizedRow(0, TokenCounts(range(40)), one.request.sampling)])
        assert logits.isfinite().all()
        assert int(sample(logits.masked_fill(barred, -torch.inf), Rules.of([one.request.sampling], [0], CPU))) < 3


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Before penalty and temperature; the likeliest as many as each request asks."""
    logits = 3 * torch.randn(4, 40)
    runs = [
        running([1, 2], logprobs=3, temperature=2.0, repetition_penalty=9.0, seed=1),
        running([1]),
        running([1], logprobs=0),
        running([1], logprobs=20, top_k=1, temperature=0.1),
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


def test_not_a_number_is_said() -> None:
    with pytest.raises(ModelError, match="NaN"):
        next_tokens(torch.tensor([[0.0, float("nan"), 1.0]]), [running([1])])


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
        rows = [running([1, 2, 3], **{"temperature": 1.0, "seed": seed} | settings) for seed in range(64)]
        for row in rows:
            for token in range(25):
                if row.seen is not None:
                    row.seen.add(token)
        return next_tokens(logits.clone(), rows)

    assert tokens(**{name: CHANGES[name]}) != tokens()


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
