"""Requests take turns, wait where memory is short and are told when a step fails or the thread ends."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from lorasmith.engine import kv_cache, scheduler
from lorasmith.serve import worker as worker_module
from lorasmith.serve.worker import WorkerStopped
from tests.support.serving import HI, Running, ask, running, said, slow, user, wait_for


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
        asked = {"model": "calm", "messages": user(HI), "temperature": 0}
        streams = [client.chat.completions.create(**asked, stream=True) for _n in range(4)]
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


@pytest.mark.parametrize("stream", [False, True])
def test_an_allocation_that_fails_is_a_503_and_the_server_goes_on(runs: Path, monkeypatch, stream) -> None:
    with running(runs) as served:
        asked = {"model": "calm", "messages": user(HI), "max_tokens": 4, "temperature": 0}
        error = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes.")

        def fails(*_args: object) -> None:
            raise error

        hook = served.manager.registry.base.model.get_input_embeddings().register_forward_hook(fails)
        with pytest.raises(openai.InternalServerError, match="not enough memory") as caught:
            served.client().chat.completions.create(**asked, stream=stream)
        assert caught.value.status_code == 503
        hook.remove()
        assert said(served.client().chat.completions.create(**asked))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_asked_of_the_model_as_it_breaks_is_told_so(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs) as served:
        worker, stepping, gate = served.manager.worker, threading.Event(), threading.Event()
        monkeypatch.setattr(worker.engine, "step", lambda: (stepping.set(), gate.wait(10), 1 / 0))
        stream = threading.Thread(
            target=lambda: ask(served, "POST", "/v1/completions", {"model": "calm", "prompt": "x"})
        )
        stream.start()
        assert stepping.wait(10)
        late = asyncio.run_coroutine_threadsafe(worker.call(lambda: 1), worker._loop)
        wait_for(lambda: worker._inbox.qsize() == 1)
        gate.set()
        with pytest.raises(WorkerStopped):
            late.result(10)
        stream.join()


def test_adapters_take_turns(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with running(runs, slots=1) as served:
        slow(served, monkeypatch)
        client, order = served.client(), []

        def one(model: str) -> None:
            client.chat.completions.create(model=model, messages=user(HI), max_tokens=5, temperature=0)
            order.append(model)

        threads = [threading.Thread(target=one, args=("loud",)) for _n in range(6)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(served.manager.in_flight) + len(order) == 6)
        threads.append(threading.Thread(target=one, args=("calm",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
        assert order.index("calm") < len(order) - 2


@pytest.mark.parametrize("cache_tokens", [2**15, 512], ids=["slots", "memory"])
def test_long_replies_of_one_adapter_do_not_keep_another_waiting(runs: Path, monkeypatch, cache_tokens: int) -> None:
    """All slots or all memory are taken by long replies; another adapter's short one is there before them."""
    monkeypatch.setattr(scheduler, "TURN", 0.2)
    monkeypatch.setattr(worker_module, "TURN", 0.2)
    asked = {"messages": user(HI), "temperature": 0, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    order: list[str] = []
    with running(runs, slots=4, cache_tokens=cache_tokens) as served:
        slow(served, monkeypatch)
        alone = said(served.client().chat.completions.create(**asked, model="loud"))

        def one(model: str, **changed: object) -> None:
            reply = said(served.client().chat.completions.create(**asked | changed, model=model))
            order.append(model)
            if model == "loud":
                assert reply == alone

        threads = in_threads(lambda: one("loud"), 6)
        wait_for(lambda: metrics(served)['lorasmith:num_requests_running{model_name="loud"}'] >= 2)
        threads += in_threads(lambda: one("calm", max_tokens=5), 1)
        for thread in threads:
            thread.join()
        assert metrics(served)["lorasmith:num_preemptions_total"] >= 1
    assert order[0] == "calm"
    assert len(order) == 7
