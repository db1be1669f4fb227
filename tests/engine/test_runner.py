"""The packed layout: which models it is for, and the row that its chunks make."""

import pytest

from lorasmith.engine.engine import Engine
from lorasmith.engine.request import Chunk, Request
from lorasmith.engine.runner import Packed, flat_row
from lorasmith.lora.router import Slice
from lorasmith.model.row import Span
from tests.support.decoding import (
    base_of,
    packed,
    prompts,
    request,
    running_request,
)
from tests.support.families import MAIN, PADDED


@pytest.mark.parametrize("family", MAIN)
def test_layout_is_the_one_that_the_probe_found(family: str) -> None:
    assert isinstance(Engine(base_of(family))._layout, Packed) == (family not in PADDED)


def test_chunks_make_one_row_with_a_slice_for_each_adapter() -> None:
    """A whole prompt, a piece of one, and the newest token of another request."""
    whole, piece, answering = (running_request(ids) for ids in ([5, 6, 7], [1, 2, 3, 4], [8, 9]))
    piece.past, answering.past = 1, 1
    for slot, (run, adapter) in enumerate(((whole, None), (piece, "a"), (answering, "a"))):
        run.slot, run.request = slot, Request(run.ids, adapter=adapter)
    row = flat_row([Chunk(whole, 3), Chunk(piece, 2), Chunk(answering, 1)])
    assert row.ids_T.tolist() == [5, 6, 7, 2, 3, 9]
    assert row.position_T.tolist() == [0, 1, 2, 1, 2, 1]
    assert row.spans == (Span(0, 3, 0, 0), Span(3, 5, 1, 1), Span(5, 6, 1, 2))
    assert row.slots == (Slice(None, 0, 3), Slice("a", 3, 6))
    assert row.counts == (1, 0, 1)  # nothing is sampled after a piece
    assert row.at_N.tolist() == [2, 5]


def test_a_step_of_single_tokens_is_in_the_order_of_the_cache() -> None:
    """Others are sorted by adapter, so that each has one slice."""
    engine = Engine(base_of("llama", adapters=2), slots=4)
    for ids, name in zip(prompts(4, 5, 6), ("a1", None, "a0"), strict=True):
        engine.add(request(ids, name, stop=False))
    chunks = packed(engine).schedule(engine._waiting)
    assert [chunk.running.request.adapter for chunk in chunks] == [None, "a0", "a1"]
    engine = Engine(engine.base, slots=4)
    for ids, name in zip(prompts(4, 5, 6), ("a1", None, "a0"), strict=True):
        engine.add(request(ids, name, stop=False))
    engine.step()
    chunks = packed(engine).schedule(engine._waiting)
    assert [chunk.running.request.adapter for chunk in chunks] == ["a1", None, "a0"]
