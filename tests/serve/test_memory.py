"""What the server does where memory is short: fewer at once and said so, nothing lost, nobody refused for another."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import torch

from lorasmith.config.model import ModelConfig
from lorasmith.engine import kv_cache, scheduler
from lorasmith.loading.load import load_base
from lorasmith.serve import startup
from lorasmith.serve.startup import cache_tokens
from lorasmith.system import memory
from tests.support import tiny
from tests.support.serving import Running, running, said, slow, user, wait_for

HI = "What do cats eat?"


@pytest.fixture
def _small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "FIRST_CAPACITY", 32)
    monkeypatch.setattr(scheduler, "HEADROOM", 4)


def metrics(served: Running) -> dict[str, float]:
    lines = served.manager.metrics_text().decode().splitlines()
    return {name: float(value) for name, _space, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def in_threads(work: Callable[[], object], count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _n in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_chats_without_a_bound_run_beside_each_other(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may come to the whole context, which the cache holds twice; all four slots are in use at once."""
    with running(runs, slots=4, cache_tokens=4 * 128, context=120) as served:
        slow(served, monkeypatch)
        client = served.client()
        streams = [client.chat.completions.create(model="calm", messages=user(HI), stream=True) for _n in range(4)]
        for stream in streams:
            next(iter(stream))
        assert metrics(served)['lorasmith:num_requests_running{model_name="calm"}'] == 4
        for stream in streams:
            stream.close()


@pytest.mark.usefixtures("_small_regions")
def test_where_memory_is_short_it_is_said_and_replies_stay_the_same(runs: Path, monkeypatch, caplog) -> None:
    asked = {"model": "loud", "messages": user(HI), "max_tokens": 60, "temperature": 1.0}
    with running(runs, slots=4) as served:
        expected = [said(served.client().chat.completions.create(**asked, seed=seed)) for seed in range(6)]
    answers: dict[int, str] = {}
    with running(runs, slots=4, cache_tokens=128) as served, caplog.at_level(logging.WARNING, "lorasmith.serve"):
        slow(served, monkeypatch)
        seeds = iter(range(6))

        def one() -> None:
            seed = next(seeds)
            answers[seed] = said(served.client().chat.completions.create(**asked, seed=seed))

        for thread in in_threads(one, 6):
            thread.join()
        found = metrics(served)
    assert [answers[seed] for seed in range(6)] == expected
    assert found["lorasmith:num_preemptions_total"] > 0
    assert (found["lorasmith:kv_cache_tokens"], found["lorasmith:max_concurrency"]) == (128, 1)
    told = [record.getMessage() for record in caplog.records if "wait for memory" in record.getMessage()]
    assert len(told) == 1
    assert "of 4 slots" in told[0]


@pytest.mark.usefixtures("_small_regions")
def test_what_waits_for_memory_is_not_called_running(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(runs, slots=4, cache_tokens=96) as served:
        slow(served, monkeypatch)
        ask = {"messages": user(HI), "max_tokens": 60, "model": "calm"}
        threads = in_threads(lambda: served.client().chat.completions.create(**ask), 4)
        wait_for(lambda: len(served.manager.in_flight) == 4)
        wait_for(lambda: metrics(served)['lorasmith:num_requests_waiting{model_name="calm"}'] >= 1)
        found = metrics(served)
        assert found['lorasmith:num_requests_running{model_name="calm"}'] <= 3
        for thread in threads:
            thread.join()


def test_the_context_is_no_longer_than_the_cache(runs: Path) -> None:
    with running(runs, cache_tokens=40) as served:
        (model, *_rest) = served.client().models.list()
        assert model.max_model_len == 40
        with pytest.raises(openai.BadRequestError, match="context length of 40 tokens"):
            served.client().completions.create(model="calm", prompt=[5] * 39, max_tokens=4)
        assert served.client().completions.create(model="calm", prompt=[5] * 39, max_tokens=1).choices


def test_the_cache_is_a_quarter_of_what_is_free_where_the_base_is(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))
    asked: list[torch.device] = []
    monkeypatch.setattr(startup, "available_mib", lambda device: asked.append(device) or 64.0)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, bytes
    assert cache_tokens(base) == 64 * 2**20 // 4 // per_token
    assert asked == [base.device]


@pytest.mark.parametrize("stream", [False, True])
def test_an_allocation_that_fails_is_a_503_and_the_server_goes_on(runs: Path, monkeypatch, stream) -> None:
    with running(runs) as served:
        asked = {"model": "calm", "messages": user(HI), "max_tokens": 4}
        error = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes.")

        def fails(*_args: object) -> None:
            raise error

        hook = served.manager.registry.base.model.get_input_embeddings().register_forward_hook(fails)
        with pytest.raises(openai.InternalServerError, match="not enough memory") as caught:
            served.client().chat.completions.create(**asked, stream=stream)
        assert caught.value.status_code == 503
        hook.remove()
        assert said(served.client().chat.completions.create(**asked))


def test_an_adapter_for_which_memory_is_short_is_refused_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(runs) as served:
        registry = served.manager.registry

        def fails(*_args: object) -> None:
            raise MemoryError

        monkeypatch.setattr("lorasmith.serve.registry.attach", fails)
        with pytest.raises(openai.InternalServerError, match="not enough memory"):
            served.client().post("/adapters", body={"name": "new", "path": "loud"}, cast_to=object)
        assert "new" not in registry.names()
        assert said(served.client().chat.completions.create(model="calm", messages=user(HI), max_tokens=2))


def test_memory_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(ModelConfig(model=str(tiny.model_folder()), dtype="float32", device="cpu"))
    monkeypatch.setattr(memory, "_groups_mib", lambda: 0.0)
    assert cache_tokens(base) == kv_cache.FIRST_CAPACITY
