"""The groups of a row: every token asks once, and sees what stands before it in its own examples, and nothing else."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.model import groups as groups_module
from lorasmith.model.groups import AttentionGroup, attention_groups
from lorasmith.model.row import Span
from tests.support.trees import path, trees

CPU = torch.device("cpu")


def seen_by_the_book(spans: Sequence[Span], window: int | None) -> dict[int, list[int]]:
    """What each token of the row sees: the last `window` tokens of its own path, itself included."""
    seen = {}
    for i, span in enumerate(spans):
        places = path(spans, i)
        for place in range(span.start, span.end):
            before = places[: places.index(place) + 1]
            seen[place] = before if window is None else before[-window:]
    return seen


def queries(groups: Sequence[AttentionGroup], window: int | None) -> Iterator[tuple[int, list[int]]]:
    """Each query's place in the row, fillers left out, and the places of the keys that the mask shows it."""
    for g in groups:
        assert isinstance(g.keys, torch.Tensor)
        keys_GS = g.keys.view(g.blocks, g.longest)
        to_GL = g.to_T.view(g.blocks, -1)
        mask_GLS = g.mask(window, 1)[:, 0].expand(g.blocks, -1, -1)
        fillers = set() if g.fillers is None else set(g.fillers.tolist())
        for n in range(g.to_T.numel()):
            p, offset = divmod(n, to_GL.shape[1])
            if n not in fillers:
                assert g.from_T[n] == to_GL[p, offset]
                yield int(to_GL[p, offset]), keys_GS[p][mask_GLS[p, offset]].tolist()


@pytest.mark.parametrize("piece", [3, 256])
@settings(deadline=None, max_examples=60)
@given(spans=trees(), window=st.sampled_from([None, 1, 3, 7]), product=st.sampled_from([1, 64, 2**18]))
def test_every_token_asks_once_and_sees_what_it_may(
    piece: int, spans: tuple[Span, ...], window: int | None, product: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "QUERY_BLOCK", piece)
        patch.setattr(groups_module, "MAX_PRODUCT", product)
        groups = attention_groups(spans, CPU)
    asked = list(queries(groups, window))
    assert sorted(place for place, _keys in asked) == list(range(spans[-1].end))
    assert dict(asked) == seen_by_the_book(spans, window)


@settings(deadline=None, max_examples=60)
@given(spans=trees(most=12, longest=40))
def test_a_group_is_of_one_kind_and_one_size(spans: tuple[Span, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "QUERY_BLOCK", 16)
        patch.setattr(groups_module, "MAX_PRODUCT", 1024)
        groups = attention_groups(spans, CPU)
    for g in groups:
        lengths = [int((line < spans[-1].end).sum()) for line in g.to_T.view(g.blocks, -1)]
        assert max(lengths) <= 16, "no product grows with the square of a span"
        assert min(lengths) >= groups_module.MIN_LENGTH_RATIO * max(lengths)
        assert lengths == sorted(lengths, reverse=True)
        past = int(g.position_GL[0, 0])
        assert g.blocks == 1 or g.blocks * lengths[0] * (past + lengths[0]) <= 1024
        assert g.longest % groups_module.ROUND_S == 0
        assert g.to_T.numel() // g.blocks == 1 or g.to_T.numel() // g.blocks % groups_module.ROUND_L == 0


def test_fillers_go_behind_the_rows_end() -> None:
    (g,) = attention_groups((Span(0, 5), Span(5, 9)), CPU)
    assert g.blocks == 2
    assert g.to_T.tolist() == [*range(5), *[9] * 11, *range(5, 9), *[9] * 12]
    assert g.fillers is not None
    assert g.fillers.tolist() == [i for i, place in enumerate(g.to_T.tolist()) if place == 9]
    assert int(g.from_T.max()) == 8


def test_a_token_alone_needs_no_fillers() -> None:
    first, second = attention_groups((Span(0, 3), Span(3, 4, parent=0), Span(4, 5, parent=0)), CPU)
    assert first.blocks == 1
    assert (second.blocks, second.to_T.tolist(), second.fillers) == (2, [3, 4], None)


def test_masks_are_made_once_a_row() -> None:
    (g,) = attention_groups((Span(0, 20),), CPU)
    assert g.mask(4, 2) is g.mask(4, 2)
    assert not torch.equal(g.mask(4, 2), g.mask(None, 2))
    for dtype in (torch.float32, torch.bfloat16):
        g.bias(4, 2, dtype)
    made = list(g.masks.values())
    g.bias(4, 2, torch.float32)
    assert [id(t) for t in g.masks.values()] == [id(t) for t in made]
