"""Places and memory: as many at once as there are slots; who must wait is computed again, and answers the same."""

import pytest
import torch

from lorasmith.engine import kv_cache, scheduler
from lorasmith.engine.engine import Engine
from lorasmith.engine.prefix_cache import BLOCK
from lorasmith.errors import DataError
from tests.support.decoding import base_of, drain, packed, prompts, request, run, tokens_through
from tests.support.families import no_casts_down


@pytest.fixture(autouse=True)
def _small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions that suit a model of 64 positions."""
    monkeypatch.setattr(kv_cache, "FIRST_CAPACITY", 8)
    monkeypatch.setattr(kv_cache, "LAST_DOUBLED", 32)
    monkeypatch.setattr(scheduler, "HEADROOM", 2)


def test_slots_and_not_the_longest_reply_decide_how_many_run() -> None:
    """Each might come to 64 positions, and the cache holds 80 tokens: five short ones run at once all the same."""
    engine = Engine(base_of("llama"), slots=5, cache_tokens=80)
    keys = [engine.add(request(ids, stop=False, max_new_tokens=60)) for ids in prompts(5, 6, 4, 5, 6)]
    assert {event.key for event in engine.step()} == set(keys)
    assert all(map(engine.is_running, keys))
    assert engine.preemptions == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_who_loses_a_place_answers_as_if_alone(family: str) -> None:
    """Seeds, penalties and adapters; memory for about two of six, and never more taken than there is."""
    base = base_of(family, torch.float64, adapters=2)
    names = (None, "a0", "a1", "a0", None, "a1")
    asked = [
        request(ids, name, stop=False, max_new_tokens=20, temperature=1.0, seed=seed, repetition_penalty=1.3)
        for seed, (ids, name) in enumerate(zip(prompts(9, 5, 17, 6, 12, 3), names, strict=True))
    ]
    with no_casts_down():
        expected = [run(Engine(base), [one])[0] for one in asked]
        engine, found = Engine(base, slots=6, tokens=16, cache_tokens=64), dict[int, list[int]]()
        for one in asked:
            engine.add(one)
        while engine.busy:
            for event in engine.step():
                found.setdefault(event.key, []).append(event.token)
            assert packed(engine).cache.allocated <= 64
    assert [found[key] for key in sorted(found)] == expected
    assert engine.preemptions > 0


def test_the_newest_goes_and_comes_back_first() -> None:
    engine = Engine(base_of("llama"), slots=4, cache_tokens=32)
    first, second = (engine.add(request(ids, stop=False, max_new_tokens=20)) for ids in prompts(6, 6))
    while not engine.preemptions:
        engine.step()
    third = engine.add(request(prompts(4)[0], stop=False, max_new_tokens=2))
    assert (engine.is_running(first), engine.is_running(second)) == (True, False)
    ends = [event.key for event in drain(engine) if event.finish]
    assert ends.index(second) < ends.index(third) or not engine.is_running(third)
    assert ends[0] == first


def test_one_that_waits_for_memory_can_be_cancelled() -> None:
    engine = Engine(base_of("llama"), slots=4, cache_tokens=32)
    first, second = (engine.add(request(ids, stop=False, max_new_tokens=20)) for ids in prompts(6, 6))
    while not engine.preemptions:
        engine.step()
    engine.cancel(second)
    assert {event.key for event in drain(engine)} == {first}
    assert packed(engine).cache.reserved == 0


def test_a_known_beginning_is_not_computed_again_after_a_wait() -> None:
    base = base_of("llama")
    engine = Engine(base, slots=4, cache_tokens=16 * BLOCK)
    long, other = prompts(5 * BLOCK, 5 * BLOCK)
    asked = [request(ids, stop=False, max_new_tokens=20) for ids in (long, other)]
    expected = [run(Engine(base), [one])[0] for one in asked]
    packed(engine).cache.limit = 12 * BLOCK
    seen = tokens_through(engine)
    assert run(engine, asked) == expected
    assert engine.preemptions == 1
    assert max(seen[1:]) < 5 * BLOCK


def test_a_reply_ends_where_the_cache_does_whoever_else_is_there() -> None:
    base = base_of("llama")
    asked = [request(ids, stop=False, max_new_tokens=60) for ids in prompts(5, 9)]
    alone = [run(Engine(base, cache_tokens=30), [one])[0] for one in asked]
    assert [len(ids) for ids in alone] == [25, 21]
    assert run(Engine(base, cache_tokens=30), asked) == alone
    with pytest.raises(DataError, match="30"):
        Engine(base, cache_tokens=30).add(request(prompts(30)[0]))


def test_room_is_told_before_a_request_is_queued() -> None:
    engine = Engine(base_of("llama"), slots=4, cache_tokens=32)
    one = request(prompts(12)[0], stop=False)
    assert engine.has_room(one)
    engine.add(one)
    assert engine.has_room(one)
    engine.add(one)
    assert not engine.has_room(one)


def test_a_piece_of_a_prompt_is_shorter_where_much_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_MASK", 200)
    base, (ids,) = base_of("llama"), prompts(50)
    engine = Engine(base, tokens=16)
    seen = tokens_through(engine)
    asked = [request(ids, stop=False, max_new_tokens=2)]
    assert run(engine, asked) == run(Engine(base), asked)
    assert [n * sum(seen[: i + 1]) <= 200 for i, n in enumerate(seen[:-1])] == [True] * (len(seen) - 1)
    assert max(seen[-5:]) < seen[0] == 12


def test_memory_is_taken_from_the_adapter_that_has_the_most_requests() -> None:
    """The only request of an adapter, though it is the newest, keeps its place."""
    engine = Engine(base_of("llama", adapters=2), slots=4, cache_tokens=48)
    many = [engine.add(request(ids, "a0", stop=False, max_new_tokens=30)) for ids in prompts(5, 5, 5)]
    one = engine.add(request(prompts(5)[0], "a1", stop=False, max_new_tokens=30))
    while not engine.preemptions:
        engine.step()
    assert [engine.is_running(key) for key in [*many, one]] == [True, True, False, True]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scheduler's monotonic clock, which shows the first number of the list."""
    now = [0.0]
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("cache_tokens", [200, 48], ids=["slots", "memory"])
def test_the_first_request_of_an_adapter_takes_a_place_of_one_that_has_several(clock, cache_tokens: int) -> None:
    """Where slots are short, and where memory is; what lost its place answers as if alone."""
    base = base_of("llama", torch.float64, adapters=2)
    many = [request(ids, "a0", stop=False, max_new_tokens=20) for ids in prompts(5, 5, 5)]
    few = request(prompts(7)[0], "a1", stop=False, max_new_tokens=4)
    with no_casts_down():
        expected = [run(Engine(base), [one])[0] for one in [*many, few]]
        engine, found = Engine(base, slots=3, cache_tokens=cache_tokens), dict[int, list[int]]()
        keys = [engine.add(one) for one in many]

        def step() -> None:
            for event in engine.step():
                found.setdefault(event.key, []).append(event.token)

        step()
        assert engine.add_first(few) is None, "they have not run for a turn"
        assert engine.preemptions == 0
        clock[0] = scheduler.TURN
        late = engine.add_first(few)
        assert late is not None
        step()
        assert [engine.is_running(key) for key in [*keys, late]] == [True, True, False, True]
        while engine.busy:
            step()
    assert [found[key] for key in [*keys, late]] == expected


def test_the_oldest_of_each_adapter_makes_no_way(clock) -> None:
    engine = Engine(base_of("llama", adapters=3), slots=2, cache_tokens=200)
    for name in ("a0", "a1"):
        engine.add(request(prompts(5)[0], name, stop=False))
    engine.step()
    clock[0] = 100.0
    assert engine.add_first(request(prompts(5)[0], "a2")) is None
    assert engine.preemptions == 0


def test_none_makes_way_for_a_request_that_would_not_fit_all_the_same(clock) -> None:
    engine = Engine(base_of("llama", adapters=2), slots=3, cache_tokens=48)
    for ids in prompts(20, 5, 5):
        engine.add(request(ids, "a0", stop=False))
    engine.step()
    clock[0] = 100.0
    assert engine.add_first(request(prompts(40)[0], "a1")) is None
    assert engine.preemptions == 0
