"""Blocks of prompts: exact, keyed by what the adapter holds, bounded."""

import pytest
import torch

from lorasmith.engine.engine import Engine
from lorasmith.engine.prefix_cache import BLOCK
from tests.support.decoding import base_of, drain, packed, prompts, request, run, tokens_through
from tests.support.families import no_casts_down


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_known_beginning_is_not_computed_again_and_changes_nothing(family: str) -> None:
    base = base_of(family, torch.float64, adapters=1)
    first, second = prompts(40, 50)
    second = first[: 2 * BLOCK + 5] + second[:9]
    asked = [request(ids, name, stop=False, max_new_tokens=4) for ids in (first, second) for name in ("a0", None)]
    with no_casts_down():
        expected = [run(Engine(base), [one])[0] for one in asked]
        engine = Engine(base)
        seen = tokens_through(engine)
        for one, answer in zip(asked, expected, strict=True):
            assert run(engine, [one])[0] == answer
    assert [n for n in seen if n > 1] == [40, 40, 14, 14]


def test_a_prompt_of_whole_blocks_keeps_its_last_token() -> None:
    base, (ids,) = base_of("llama"), prompts(2 * BLOCK)
    engine = Engine(base)
    seen = tokens_through(engine)
    assert run(engine, [request(ids, stop=False)]) == run(engine, [request(ids, stop=False)])
    assert [n for n in seen if n > 1] == [2 * BLOCK, BLOCK]


def test_another_adapter_never_sees_these_blocks() -> None:
    """Not under another name, not when one of the same name comes after it."""
    base, (ids,) = base_of("llama", adapters=2), prompts(40)
    engine = Engine(base)
    answers = {name: run(Engine(base), [request(ids, name, stop=False)])[0] for name in (None, "a0", "a1")}
    for name, answer in answers.items():
        assert run(engine, [request(ids, name, stop=False)])[0] == answer
    base.adapters["a0"] = base.adapters["a1"]  # the name means another one now
    assert run(engine, [request(ids, "a0", stop=False)])[0] == answers["a1"]


def test_blocks_are_bounded_and_the_least_recently_used_goes() -> None:
    base = base_of("llama")
    engine = Engine(base, cache_tokens=4 * 4 * BLOCK)  # four blocks of beginnings
    for ids in prompts(40, 41, 42, 43):
        run(engine, [request(ids, stop=False, max_new_tokens=1)])
    prefixes = packed(engine).prefixes
    assert prefixes.blocks == 4
    assert all(len(store) <= 4 for store in prefixes._stores.values())


def test_blocks_whose_beginning_went_are_still_their_own() -> None:
    """The first block of a prompt makes room for another's, its later ones stay; then the prompt comes again."""
    base = base_of("llama", torch.float64)
    long, other = prompts(4 * BLOCK + 1, BLOCK + 1)
    asked = [request(ids, stop=False, max_new_tokens=4) for ids in (long, other, long, long, other, long)]
    with no_casts_down():
        expected = [run(Engine(base), [one])[0] for one in asked]
        engine = Engine(base, cache_tokens=4 * 4 * BLOCK)  # four blocks of beginnings
        assert [run(engine, [one])[0] for one in asked] == expected


def test_an_adapter_trained_on_in_the_middle_of_a_prompt_leaves_no_blocks_under_its_new_content() -> None:
    base, (ids,) = base_of("llama", adapters=1), prompts(40)
    engine, one = Engine(base, tokens=20), request(ids, "a0", stop=False)
    engine.add(one)
    engine.step()
    with torch.no_grad():
        for parameter in base.adapters["a0"].parameters.values():
            parameter.mul_(-3)
    drain(engine)
    assert run(engine, [one]) == run(Engine(base), [one])


def test_an_interrupt_while_blocks_are_kept_leaves_no_name_without_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    base, (first, second) = base_of("llama"), prompts(60, 40)
    engine, one = Engine(base), request(second, stop=False)
    expected = run(Engine(base), [one])
    run(engine, [request(first, stop=False)])
    prefixes = packed(engine).prefixes
    inner, calls = prefixes._room, iter(range(9))

    def interrupted(key: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return inner(key, like)

    monkeypatch.setattr(prefixes, "_room", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(engine, [one])
    monkeypatch.undo()
    assert run(engine, [one]) == expected
    assert run(engine, [one]) == expected


def test_blocks_outlive_a_step_that_fails() -> None:
    """And stand in the cache again when their prompt comes."""
    base, (ids,) = base_of("llama"), prompts(40)
    engine, one = Engine(base), request(ids, stop=False)
    expected = run(engine, [one])
    packed(engine).clear()
    seen = tokens_through(engine)
    assert run(engine, [one]) == expected
    assert seen[0] == BLOCK
