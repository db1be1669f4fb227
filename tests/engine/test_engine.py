"""Law 8, and that greedy decoding is transformers' own."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from lorasmith.config.lora import LoraConfig
from lorasmith.config.sampling import SamplingConfig
from lorasmith.engine.engine import Engine, generate, replies
from lorasmith.engine.request import Reply, Request
from lorasmith.engine.runner import Packed
from lorasmith.errors import AdapterError, DataError, ModelError, OutOfMemoryError
from lorasmith.lora.inject import inject
from lorasmith.model.base import Base
from tests.support.decoding import (
    STOP,
    base_of,
    drain,
    logits_of_steps,
    prompts,
    request,
    run,
    theirs,
)
from tests.support.families import MAIN, embedding, no_casts_down, stir

OTHERS = ("mistral", "granite", "cohere", "gemma2", "stablelm", "falcon", "gpt_neox")
LENGTHS = (5, 1, 12, 3, 7)


def logits_alone(base: Base, one: Request) -> torch.Tensor:
    engine = Engine(base)
    return logits_of_steps(engine, lambda: run(engine, [one]))[0]


@pytest.mark.parametrize("penalty", [1.0, 3.0])
@pytest.mark.parametrize("family", [*MAIN, *OTHERS])
def test_greedy_equals_generate(family: str, penalty: float) -> None:
    base, texts = base_of(family), prompts(*LENGTHS)
    expected = [theirs(base, ids, repetition_penalty=penalty) for ids in texts]
    asked = [request(ids, repetition_penalty=penalty) for ids in texts]
    assert run(Engine(base, slots=3, tokens=6), asked) == expected
    # a random model may say one word for ever; with a penalty it cannot
    assert penalty == 1 or len({token for ids in expected for token in ids}) > 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_with_an_adapter_equals_generate_with_it(family: str) -> None:
    base, ids = base_of(family, adapters=2), prompts(6)[0]
    answers = []
    for name in (None, "a0", "a1"):
        answers.append(theirs_with(base, ids, name, repetition_penalty=2.0))
        assert run(Engine(base), [request(ids, name, repetition_penalty=2.0)]) == [answers[-1]]
    assert len(set(map(tuple, answers))) == 3


def theirs_with(base: Base, ids: Sequence[int], adapter: str | None, **options: object) -> list[int]:
    base.router.active = adapter
    return theirs(base, ids, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", MAIN)
def test_mixed_equals_alone(family: str, dtype: torch.dtype) -> None:
    """Adapters, arrivals and lengths mixed; few places, small steps: the same logits as each request alone."""
    base = base_of(family, dtype, adapters=3)
    names = ("a1", None, "a0", "a2", "a1", None, "a2", "a0")
    asked = [
        request(ids, name, stop=False, max_new_tokens=4 + i)
        for i, (ids, name) in enumerate(zip(prompts(5, 1, 12, 3, 7, 20, 2, 9), names, strict=True))
    ]
    with no_casts_down():  # float64 stays float64
        alone = [logits_alone(base, one) for one in asked]
        engine = Engine(base, slots=4, tokens=7)
        mixed = logits_of_steps(engine, lambda: arrive_one_by_one(engine, asked))
    limit = 1e-9 if dtype == torch.float64 else 1e-4  # rounding, amplified by weights of random models
    assert [len(rows) for rows in mixed.values()] == [4 + i for i in range(8)]
    for i, rows in enumerate(alone):
        torch.testing.assert_close(mixed[i], rows, rtol=limit, atol=limit)


def arrive_one_by_one(engine: Engine, asked: Sequence[Request]) -> None:
    for i, one in enumerate(asked):
        assert engine.add(one) == i
        if i % 3 == 1:
            engine.step()
    drain(engine)


@pytest.mark.parametrize("tokens", [1, 2, 5, 19, 64])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_prompt_in_pieces_equals_whole(family: str, tokens: int) -> None:
    base, (ids,) = base_of(family, torch.float64), prompts(19)
    engine = Engine(base, slots=1, tokens=tokens)
    assert isinstance(engine._layout, Packed)
    with no_casts_down():
        expected = logits_alone(base, request(ids, stop=False))
        found = logits_of_steps(engine, lambda: run(engine, [request(ids, stop=False)]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_embedding_head_and_whole_modules_mixed(family: str) -> None:
    """Adapters on what is no plain linear layer, one of them a trained copy of the head."""
    base, texts = base_of(family), prompts(5, 9, 2)
    configs = {
        "embedding": LoraConfig(r=3, target_modules=(embedding(family),)),
        "head": LoraConfig(r=3, modules_to_save=("lm_head",)),
    }
    for name, config in configs.items():
        base.adapters[name] = inject(base.model, config, base.router, name)
        stir(base.adapters[name])
    asked = [request(ids, name) for ids in texts for name in ("head", None, "embedding")]
    expected = [theirs_with(base, one.ids, one.adapter) for one in asked]
    assert run(Engine(base, slots=5), asked) == expected


def test_requests_join_and_leave_at_each_step() -> None:
    base = base_of("llama")
    engine = Engine(base, slots=2)
    first = engine.add(request(prompts(4)[0], stop=False, max_new_tokens=3))
    assert [event.key for event in engine.step()] == [first]
    second = engine.add(request(prompts(6)[0], stop=False, max_new_tokens=5))
    third = engine.add(request(prompts(6)[0], stop=False, max_new_tokens=5))
    assert {event.key for event in engine.step()} == {first, second}  # beside a decoding one; no third place
    engine.step()
    assert {event.key for event in engine.step()} == {second, third}
    engine.cancel(second)
    engine.cancel(second)  # gone already: no error
    assert {event.key for event in drain(engine)} == {third}
    assert not engine.busy
    assert engine.step() == []


def test_ends_at_the_models_last_position() -> None:
    base = base_of("gpt2")  # 64 positions
    asked = [request(ids, stop=False, max_new_tokens=30) for ids in prompts(60, 2)]
    long, short = replies(Engine(base), asked)
    assert (len(long.ids), long.finish) == (4, "length")
    assert (len(short.ids), short.finish) == (30, "length")


def test_stop_token_is_counted_but_not_shown() -> None:
    base, (ids,) = base_of("llama"), prompts(5)
    free = run(Engine(base), [request(ids, stop=False)])[0]
    at = next(i for i, token in enumerate(free) if token > 2 and token not in free[:i] and i)
    reply = replies(Engine(base), [replace(request(ids), stop_ids=(free[at], STOP))])[0]
    text = base.tokenizer.decode(free[:at])
    assert reply == Reply(str(text), free[: at + 1], "stop")


def test_a_stop_text_that_is_a_special_token_stops_too() -> None:
    engine = Engine(base_of("llama"))
    key = engine.add(Request([5, 6], SamplingConfig(stop=("<end>", "x"))))
    assert engine._live[key].stop_ids == {STOP}


def test_leaving_early_cancels() -> None:
    engine = Engine(base_of("llama"))
    events = generate(engine, [request(ids, stop=False) for ids in prompts(3, 4)])
    next(events)
    events.close()
    assert not engine.busy
    assert run(engine, [request(prompts(3)[0])]) == run(Engine(engine.base), [request(prompts(3)[0])])


def test_refuses_what_it_cannot_answer() -> None:
    engine = Engine(base_of("llama", adapters=1))
    with pytest.raises(AdapterError, match=r"'b0'.*'a0'"):
        engine.add(request([4], "b0"))
    with pytest.raises(DataError, match="empty"):
        engine.add(request([]))
    with pytest.raises(DataError, match="64"):
        engine.add(request(prompts(64)[0]))
    assert not engine.busy


def test_leaves_no_route_behind_and_forms_no_graph() -> None:
    base = base_of("llama", adapters=1)
    run(Engine(base), [request([4, 5], "a0")])
    assert base.router.slices is None
    assert not base.router.stacked
    assert not base.model.training  # an adapter's dropout must not draw


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_step_that_fails_ends_all_and_spoils_nothing(family: str) -> None:
    """In the middle of prompts and answers, by an interrupt or an error."""
    base = base_of(family, adapters=1)
    asked = [request(ids, name, stop=False) for ids, name in zip(prompts(5, 30, 9), (None, "a0", None), strict=True)]
    expected = [run(Engine(base), [one])[0] for one in asked]
    engine = Engine(base, slots=2, tokens=8)
    for calls, kind in ((1, KeyboardInterrupt), (2, RuntimeError), (5, KeyboardInterrupt)):
        seen = count(1)

        def fails(*_args: object, calls: int = calls, kind: type[BaseException] = kind, seen: Any = seen) -> None:
            if next(seen) == calls:
                raise kind

        hook = base.model.get_input_embeddings().register_forward_hook(fails)
        for one in asked:
            engine.add(one)
        with pytest.raises(kind):
            drain(engine)
        hook.remove()
        assert not engine.busy
        assert engine.step() == []
        assert run(engine, asked) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_numbers_in_the_cache_disturb_nobody_later(family: str) -> None:
    """A long request of a broken adapter leaves NaN behind the keys of a short one in its place."""
    base = base_of(family, adapters=1)
    broken, short, long = prompts(25, 5, 30)
    asked = [request(short, stop=False), request(long, stop=False)]
    expected = run(Engine(base), asked)
    with torch.no_grad():
        next(iter(base.adapters["a0"].parameters.values())).fill_(torch.nan)
    engine = Engine(base, slots=2)
    with pytest.raises(ModelError, match="NaN"):
        run(engine, [request(broken, "a0")])
    assert run(engine, asked) == expected


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_an_allocation_that_fails_is_told_and_the_next_requests_are_answered(family: str) -> None:
    base = base_of(family)
    engine, one = Engine(base), request(prompts(5)[0], stop=False)
    expected = run(engine, [one])

    def fails(*_args: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    hook = base.model.get_input_embeddings().register_forward_hook(fails)
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        run(engine, [one])
    hook.remove()
    assert run(engine, [one]) == expected


def test_all_of_several_requests_are_queued_or_none() -> None:
    engine = Engine(base_of("llama", adapters=1))
    first = engine.add(request([4, 5], stop=False, max_new_tokens=3))
    with pytest.raises(AdapterError, match="b0"):
        run(engine, [request([4]), request([5], "b0")])
    with pytest.raises(DataError, match="empty"):
        engine.add_all([request([4]), request([])])
    assert {event.key for event in drain(engine)} == {first}
