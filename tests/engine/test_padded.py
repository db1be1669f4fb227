"""The padded layout: batches that fit the model's positions, and rows that have ended."""

from collections import deque

import pytest

from lorasmith.engine.engine import Engine, replies
from lorasmith.engine.padded import Padded
from lorasmith.engine.request import Request
from tests.support.decoding import base_of, prompts, request, run, running_request


def test_padded_batches_fit_the_models_positions() -> None:
    """A long prompt beside a long reply would need more places than each needs alone: then one after the other."""
    base = base_of("stablelm")
    asked = [request(ids, stop=False, max_new_tokens=n) for ids, n in zip(prompts(50, 3), (4, 40), strict=True)]
    engine = Engine(base)
    for one in asked:
        engine.add(one)
    assert {event.key for event in engine.step()} == {0}
    assert [one.ids for one in replies(Engine(base), asked)] == [run(Engine(base), [one])[0] for one in asked]


@pytest.mark.parametrize("family", ["bloom", "stablelm"])
def test_a_row_that_has_ended_stays_until_its_batch_is_over(family: str) -> None:
    """The next batch begins with the third request, and every reply is the one that it would be alone."""
    base = base_of(family, adapters=1)
    lengths, names = (3, 9, 5), ("a0", None, "a0")
    asked = [
        request(ids, name, stop=False, max_new_tokens=n)
        for ids, name, n in zip(prompts(*lengths), names, (6, 2, 3), strict=True)
    ]
    expected = [run(Engine(base), [one])[0] for one in asked]
    engine = Engine(base, slots=2)
    keys = [engine.add(one) for one in asked]
    steps = []
    while engine.busy:
        steps.append({event.key for event in engine.step()})
    assert steps == [set(keys[:2])] * 2 + [{keys[0]}] * 4 + [{keys[2]}] * 3
    assert run(Engine(base, slots=2), asked) == expected


def test_a_batch_is_sorted_by_adapter_and_cleared_whole() -> None:
    layout = Padded(base_of("bloom", adapters=1), slots=3)
    waiting = deque(running_request(ids) for ids in prompts(3, 4, 5))
    for run_, name in zip(waiting, ("b", None, "a"), strict=True):
        run_.request = Request(run_.ids, adapter=name)
    assert [chunk.running.request.adapter for chunk in layout.schedule(waiting)] == [None, "a", "b"]
    assert not waiting
    layout.clear()
    assert layout.schedule(waiting) == []
    assert layout.admits([10**9])
