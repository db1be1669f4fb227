"""Regions of the KV cache: never more memory than the limit, and what is there stays."""

import pytest
import torch

from lorasmith.engine import kv_cache
from lorasmith.engine.engine import Engine
from lorasmith.engine.kv_cache import KEEP_RATIO, KEEP_TOKENS, KVCache
from lorasmith.model.row import Span
from tests.support.decoding import (
    base_of,
    packed,
    prompts,
    request,
    run,
)


@pytest.fixture(autouse=True)
def _small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions that suit a model of 64 positions."""
    monkeypatch.setattr(kv_cache, "FIRST_CAPACITY", 8)
    monkeypatch.setattr(kv_cache, "LAST_DOUBLED", 32)


def test_memory_of_a_long_request_is_given_back() -> None:
    """Also beside one that goes on; and the tokens of that one stay."""
    base = base_of("llama")
    engine = Engine(base)
    cache = packed(engine).cache
    long, short = (request(ids, stop=False, max_new_tokens=n) for ids, n in zip(prompts(60, 5), (2, 30), strict=True))
    expected = run(Engine(base), [short])[0]
    packed(engine).scheduler.cache.limit = 2**20
    key = engine.add(short)
    for _n in range(30):
        engine.add(long)
    tokens, most = [], 0
    while engine.busy:
        tokens += [event.token for event in engine.step() if event.key == key]
        most = max(most, cache.allocated)
    assert tokens == expected
    assert most > KEEP_RATIO * KEEP_TOKENS / 4
    assert cache.allocated <= KEEP_RATIO * KEEP_TOKENS


def test_a_cache_never_takes_more_than_its_limit_and_keeps_what_is_there() -> None:
    """Requests grow, come and go at random; keys are the numbers of their requests and places."""
    cache, generator = KVCache(200), torch.Generator().manual_seed(0)
    lengths: dict[int, int] = {}
    for _time in range(400):
        slot = int(torch.randint(12, (1,), generator=generator))
        if slot in lengths and int(torch.randint(4, (1,), generator=generator)) == 0:
            cache.release(slot)
            del lengths[slot]
            continue
        past = lengths.get(slot, 0)
        length = min(int(torch.randint(1, 9, (1,), generator=generator)), 200 - past)
        if not length or not cache.reserve(slot, past + length):
            assert cache.reserved + cache.capacity_of(past + length) > 200
            continue
        cache.begin([Span(0, length, past, slot)], torch.device("cpu"))
        new = torch.tensor([[[float(slot)], [float(i)]] for i in range(past, past + length)])
        for layer in range(2):
            cache.extend(layer, new, -new)
        lengths[slot] = past + length
        assert cache.allocated <= 200
        for other, known in lengths.items():
            for (_layer, which), tensor in cache.tensors(other):
                sign = -1 if which else 1
                wanted = torch.tensor([[[other]] * known, [[i] for i in range(known)]], dtype=torch.float)
                assert torch.equal(tensor[:, :known] * sign, wanted)
    assert lengths


def test_cache_grows_and_places_are_used_again() -> None:
    base = base_of("llama")
    engine = Engine(base, slots=3)
    asked = [request(ids, stop=False, max_new_tokens=20) for ids in prompts(40, 3, 30, 2, 11)]
    first, again = run(engine, asked), run(engine, asked)
    assert first == again == [run(Engine(base), [one])[0] for one in asked]


def test_capacities_double_and_then_grow_by_steps() -> None:
    cache = KVCache(100)
    assert [cache.capacity_of(n) for n in (1, 8, 9, 17, 32, 33, 41, 65, 100)] == [8, 8, 16, 32, 32, 40, 48, 80, 100]
    assert cache.capacity_of(101) == 101  # a request of its own is never cut


def test_a_share_is_what_each_of_several_can_have() -> None:
    cache = KVCache(100)
    assert [cache.share(requests) for requests in (1, 2, 3, 100)] == [100, 48, 32, 0]


def test_beyond_the_limit_nothing_changes() -> None:
    cache = KVCache(24)
    assert cache.reserve(0, 9)
    assert cache.reserve(1, 3)
    assert not cache.reserve(1, 9)
    assert (cache.reserved, cache.region(0).capacity, cache.region(1).capacity) == (24, 16, 8)
    cache.release(0)
    assert cache.reserve(1, 9)
    assert cache.reserved == 16
