"""What a model's self-test lets it decode with, and what it falls back to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorasmith.engine.engine import Engine
from lorasmith.engine.kv_cache import KVCache
from lorasmith.engine.self_test import decoder_of
from lorasmith.errors import ModelError
from lorasmith.model.base import Base
from lorasmith.model.groups import AttentionGroup
from tests.support.decoding import base_of, prompts, request, run, theirs

STACKED = ("llama", "qwen2", "qwen3", "mistral")  # in groups only: gemma3_text, olmo2, granite


GROUPED = (*STACKED, "gemma3_text", "olmo2", "granite")


@pytest.mark.parametrize("family", [*GROUPED, "gpt2", "opt"])
def test_what_is_recognized_is_found_by_structure_and_tried(family: str) -> None:
    found = decoder_of(base_of(family))
    assert (found.problem, found.plain) == (None, "")
    assert found.bank is not None
    assert bool(found.bank.groups) == (family in GROUPED)
    assert found.has_stack == (family in STACKED)


def test_a_stack_that_computes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    monkeypatch.setattr("lorasmith.model.fast.stack.gated", lambda gate, up, gelu: gate * up)
    found = decoder_of(base)
    assert (found.problem, found.has_stack, found.plain) == (None, False, "")
    assert found.bank is not None


def test_groups_that_fail_leave_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object) -> torch.Tensor:
        raise ModelError("no such product")

    base = base_of("llama")
    monkeypatch.setattr("lorasmith.lora.fused.bank.BankedLinears.__call__", fails)
    found = decoder_of(base)
    assert (found.problem, found.bank) == (None, None)
    assert "no such product" in found.plain
    monkeypatch.undo()
    assert run(Engine(base), [request(prompts(4)[0])])


@pytest.mark.parametrize("fault", ["an error", "other results"])
def test_a_model_without_a_right_cache_decodes_in_padded_batches(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inner = base_of("llama"), KVCache.read

    def read(cache: KVCache, layer: int, group: AttentionGroup) -> tuple[torch.Tensor, torch.Tensor]:
        if fault == "an error":
            raise RuntimeError("no such kernel")
        k, v = inner(cache, layer, group)
        return k, -v

    monkeypatch.setattr(KVCache, "read", read)
    problem = decoder_of(base).problem
    assert problem is not None
    assert ("no such kernel" if fault == "an error" else "different results") in problem
    monkeypatch.undo()
    assert Engine(base).why == problem
    assert base.router.slices is None


def changed(base: Base, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From here on, the decoder's last hidden states [B, L, H] are changed."""

    def hook(_module: object, _inputs: object, out: Any) -> None:
        out.last_hidden_state = how(out.last_hidden_state)

    base.decoder.register_forward_hook(hook)


def with_others(states: torch.Tensor) -> torch.Tensor:
    return states + states.mean(0, keepdim=True)


def with_earlier(states: torch.Tensor) -> torch.Tensor:
    return states + states.cumsum(1) / 5  # of the tokens of this call, so that a cache makes a difference


@pytest.mark.parametrize(
    ("how", "batches", "caches"), [(None, True, True), (with_others, False, True), (with_earlier, False, False)]
)
def test_padded_batches_are_tried_and_given_up_where_they_change_the_replies(
    how: Any, batches: bool, caches: bool
) -> None:
    base = base_of("bloom")
    if how is not None:
        changed(base, how)
    found = decoder_of(base)
    assert (found.batches, found.caches) == (batches, caches)
    said = "requests are answered one by one, because padding changes their results"
    assert found.problem is not None
    assert (said in found.problem) != batches
    texts = prompts(5, 9, 3)
    wanted = [theirs(base, ids, use_cache=False) for ids in texts]
    assert run(Engine(base), [request(ids) for ids in texts]) == wanted
