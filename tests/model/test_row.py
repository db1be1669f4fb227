"""The flat row: where everything stands, and what is cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.lora.router import Slice
from lorasmith.model.head import loss_sum
from lorasmith.model.row import IGNORED, SHARED, Example, Row, Span, flatten, join
from tests.support.families import adapted, distance, examples, far_apart, gradients, one_row

A = Example([10, 11, 12, 13], [IGNORED, 12, 13, IGNORED], [1.0, 2.0, 1.0, 1.0], "a")
B = Example([20, 21], [21, 22], [1.0, 0.5], "b")


def test_where_everything_stands() -> None:
    row = flatten([A, B], total_weight=4.0, adapter="x")
    assert row.ids_T.tolist() == [10, 11, 12, 20, 21]  # 13 is never needed: nothing after it is learned
    assert row.position_T.tolist() == [0, 1, 2, 0, 1]
    assert row.spans == (Span(0, 3), Span(3, 5))
    assert row.counts == (2, 2)
    assert row.at_N.tolist() == [1, 2, 3, 4]
    assert row.target_N.tolist() == [12, 13, 21, 22]
    assert row.weight_N.tolist() == [0.5, 0.25, 0.25, 0.125]
    assert row.slots == (Slice("x", 0, 5),)
    assert row.tokens == 5
    assert (row.ids_T.dtype, row.target_N.dtype) == (torch.int64, torch.int64)


def test_an_example_counts_its_learned_tokens() -> None:
    assert (A.n_targets, A.weight, A.useful_length) == (2, 3.0, 3)
    assert Example([1, 2], [IGNORED] * 2, [1.0] * 2, "").useful_length == 0
    with pytest.raises(AssertionError):
        Example([1, 2], [2], [1.0], "")


def test_row_stays_itself_on_the_cpu() -> None:
    row = flatten([A], 1.0)
    assert row.to(torch.device("cpu")) is row


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 99)), min_size=1, max_size=5))
def test_every_learned_token_is_there_once_with_its_weight(shapes: list[tuple[int, int]]) -> None:
    batch = [e for length, seed in shapes for e in examples([length] * (seed % 3 + 1))]
    row = flatten(batch, 2.0)
    learned = [
        (e.ids[i], t, w / 2)
        for e in batch
        for i, (t, w) in enumerate(zip(e.targets, e.weights, strict=True))
        if t != IGNORED
    ]
    found = zip(row.ids_T[row.at_N].tolist(), row.target_N.tolist(), row.weight_N.tolist(), strict=True)
    assert list(found) == learned
    assert [s.end for s in row.spans[:-1]] == [s.start for s in row.spans[1:]]
    assert sum(row.counts) == len(row.at_N)
    assert all(row.position_T[s.start : s.end].tolist() == list(range(s.length)) for s in row.spans)


def uncut(batch: list[Example]) -> Row:
    """The row as it would be with all tokens: every last one learned with weight zero."""
    whole = [
        replace(e, targets=[*e.targets[:-1], 5], weights=[*e.weights[:-1], 0.0]) if e.targets[-1] == IGNORED else e
        for e in batch
    ]
    return flatten(whole, sum(e.weight for e in batch))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_cutting_after_the_last_learned_token_changes_no_loss_and_no_gradient(family: str) -> None:
    base, adapter = adapted(family)
    batch = [replace(e, targets=[*e.targets[:4], *[IGNORED] * (len(e.ids) - 4)]) for e in examples((9, 7, 12))]
    cut, whole = one_row(batch), uncut(batch)
    assert (cut.tokens, whole.tokens) == (12, 28) or cut.tokens < whole.tokens == 28
    loss, long_loss = loss_sum(base, cut), None
    loss.backward()
    found = gradients(adapter)
    long_loss = loss_sum(base, whole)
    long_loss.backward()
    assert distance(loss, long_loss) < 1e-12
    assert not far_apart(found, gradients(adapter), 1e-12)


def test_joined_rows_keep_their_spans_labels_and_adapters():
    """Common prefixes included, whose spans no count knows."""
    prefix = list(range(SHARED))
    parts = [[Example([*prefix, e], [-100] * SHARED + [e], [1.0] * (SHARED + 1), "x") for e in (50, 60)],
             [Example([7, 8, 9], [-100, 8, 9], [1.0, 2.0, 3.0], "y")]]  # fmt: skip
    rows = [flatten(part, 2.0, name, share=True) for part, name in zip(parts, "ab", strict=True)]
    row, (a, b) = join(rows), rows
    assert row.tokens == a.tokens + b.tokens
    assert row.ids_T.tolist() == a.ids_T.tolist() + b.ids_T.tolist()
    assert [span.parent for span in row.spans] == [-1, 0, 0, -1]
    assert [span.start for span in row.spans] == [0, SHARED, SHARED + 1, SHARED + 2]
    assert row.slots == (Slice("a", 0, a.tokens), Slice("b", a.tokens, row.tokens))
    assert row.label_slots == (Slice("a", 0, 2), Slice("b", 2, 4))
    assert row.at_N.tolist() == [SHARED, SHARED + 1, SHARED + 3, SHARED + 4]
    assert row.weight_N.tolist() == [0.5, 0.5, 1.0, 1.5]
    nested = join([row, b])
    assert nested.label_slots == (Slice("a", 0, 2), Slice("b", 2, 4), Slice("b", 4, 6))
