"""What examples begin with stands once in the row: the same tokens for each, the same loss, the same gradients."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.lora.inject import Adapter
from lorasmith.model.base import Base
from lorasmith.model.forward import hidden, row_of
from lorasmith.model.head import loss_sum, token_losses
from lorasmith.model.row import IGNORED, SHARED, Example, Row, flatten
from tests.support.families import CONFIGS, PADDED, WORDS, adapted, distance, examples, far_apart, gradients

PACKED = [family for family in CONFIGS if family not in PADDED]
CHUNKS = (
    [3] * 9,
    [4, 3, 5, 4] * 2,
    [3] * 8 + [4],
    [5],
    [3, 4, 4],
)  # around SHARED, so that they meet it from both sides


def made_of(ids: Sequence[int], seed: int, learned: float = 0.4) -> Example:
    """An example of these tokens; random ones of them are learned, at random weights. Some end with tokens in vain."""
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(len(ids), generator=generator) < learned).tolist()
    targets = torch.randint(3, WORDS, (len(ids),), generator=generator).tolist()
    weights = (torch.rand(len(ids), generator=generator, dtype=torch.float64) + 0.5).tolist()
    return Example(
        list(ids), [t if k else IGNORED for t, k in zip(targets, keep, strict=True)], weights, f"test:{seed}"
    )


@st.composite
def batches(draw: st.DrawFn) -> list[Example]:
    """Examples of a few chunks each, so that many begin alike, and some are the same or begin another."""
    some = st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=4)
    texts = draw(st.lists(some, min_size=1, max_size=6))
    return [
        made_of([token for chunk in text for token in chunk], draw(st.integers(0, 99)), draw(st.sampled_from([0.2, 1])))
        for text in texts
    ]


def to_the_end(ids: Sequence[int], seed: int, learned: float = 0.4) -> Example:
    """The same, its last token learned."""
    example = made_of(ids, seed, learned)
    return replace(example, targets=[*example.targets[:-1], 5])


def useful(example: Example) -> list[int]:
    return example.ids[: example.useful_length]


def along(row: Row, place: int) -> list[int]:
    """The places of a token and of all before it, from the spans alone."""
    i = next(i for i, span in enumerate(row.spans) if span.start <= place < span.end)
    places: list[int] = []
    end = place + 1
    while i >= 0:
        places = [*range(row.spans[i].start, min(end, row.spans[i].end)), *places]
        i, end = row.spans[i].parent, row.tokens
    return places


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@settings(deadline=None)
@given(batches(), st.booleans())
def test_every_example_reads_its_own_tokens_along_its_spans(batch: list[Example], share: bool) -> None:
    row = flatten(batch, 2.0, share=share)
    places = iter(row.at_N.tolist())
    for example, count in zip(batch, row.counts, strict=True):
        assert count == example.n_targets
        for i in example.learned:
            path = along(row, next(places))
            assert row.ids_T[path].tolist() == example.ids[: i + 1]
            assert row.position_T[path].tolist() == list(range(i + 1))


@settings(deadline=None)
@given(batches())
def test_every_learned_token_stands_once_per_example_with_its_weight(batch: list[Example]) -> None:
    row = flatten(batch, 2.0, share=True)
    learned = [(e.ids[i], e.targets[i], e.weights[i] / 2, i) for e in batch for i in e.learned]
    at = row.at_N
    found = zip(
        row.ids_T[at].tolist(), row.target_N.tolist(), row.weight_N.tolist(), row.position_T[at].tolist(), strict=True
    )
    assert list(found) == learned


@settings(deadline=None)
@given(batches())
def test_what_is_shared_is_long_enough_and_nothing_else_is_lost(batch: list[Example]) -> None:
    row, whole = flatten(batch, 2.0, share=True), flatten(batch, 2.0)
    assert whole.tokens == sum(e.useful_length for e in batch)
    assert all(span.parent == -1 for span in whole.spans)
    pairs = [alike(useful(a), useful(b)) for a, b in combinations(batch, 2)]
    assert (row.tokens < whole.tokens) == any(both >= SHARED for both in pairs)
    assert row.tokens <= whole.tokens
    ends = [e.end for e in row.spans]
    assert [span.start for span in row.spans] == [0, *ends][: len(row.spans)]
    assert all(span.parent < i and span.length > 0 for i, span in enumerate(row.spans))
    assert all(row.spans[span.parent].length >= SHARED for span in row.spans if span.parent >= 0)


@settings(deadline=None)
@given(batches())
def test_examples_that_begin_alike_share_all_of_it(batch: list[Example]) -> None:
    """Of the tokens that two examples begin with, those that stand twice are fewer than SHARED."""
    row = flatten(batch, 2.0, share=True)
    last = iter(row.at_N.split(row.counts))
    paths = [along(row, int(at[-1])) if len(at) else [] for at in last]
    for a, b in combinations(range(len(batch)), 2):
        both, shared = alike(useful(batch[a]), useful(batch[b])), alike(paths[a], paths[b])
        assert shared <= both
        assert both - shared < SHARED


S, Q, R = list(range(10, 22)), list(range(30, 40)), list(range(50, 59))  # a system line, a question, a reply
TREE = [
    to_the_end([*S, *Q, *R, 7, 8, 9], 1),
    to_the_end([*S, *Q, *R, 60, 61], 2),  # three levels: S, Q, R
    to_the_end([*S, *Q, 70, 71, 72, 73], 3),
    to_the_end([*S, 80, 81, 82], 4),
    to_the_end([*S, 80, 81, 82], 5),  # the same again, other tokens learned
    to_the_end([*S, *Q], 6, learned=1),  # begins another, and learns what is shared
    to_the_end([*S[:5], 90, 91], 7),  # too short to share
    to_the_end([40, 41, 42, 43], 8),
]


def test_the_tree_of_the_tests_below() -> None:
    row = flatten(TREE, 1.0, share=True)
    spans = [(span.length, span.parent) for span in row.spans]
    assert spans[:4] == [(12, -1), (10, 0), (9, 1), (3, 2)]
    assert len(set(row.at_N.tolist())) < len(row.at_N), "tokens are learned for several examples at once"
    assert (row.tokens, flatten(TREE, 1.0).tokens) == (
        12 + 10 + 9 + 3 + 2 + 4 + 3 + 3 + 7 + 4,
        34 + 33 + 26 + 30 + 22 + 11,
    )


def test_a_learned_token_in_the_middle_of_what_is_shared_splits_nothing() -> None:
    first = Example([*S, 5], [IGNORED] * 6 + [77] + [IGNORED] * 5 + [78], [1.0] * 13, "a")
    second = Example([*S, 6], [IGNORED] * 12 + [79], [2.0] * 13, "b")
    row = flatten([first, second], 4.0, share=True)
    assert [(s.start, s.end, s.parent) for s in row.spans] == [(0, 12, -1), (12, 13, 0), (13, 14, 0)]
    assert row.at_N.tolist() == [6, 12, 13]
    assert row.target_N.tolist() == [77, 78, 79]
    assert row.weight_N.tolist() == [0.25, 0.25, 0.5]
    assert row.counts == (2, 1)


def test_what_nobody_learns_from_is_cut_before_it_is_shared() -> None:
    first = Example([*S, 5], [IGNORED] * 9 + [77] + [IGNORED] * 3, [1.0] * 13, "a")
    row = flatten([first, Example([*S, 5], [IGNORED] * 13, [1.0] * 13, "b")], 1.0, share=True)
    assert (row.tokens, row.counts, len(row.spans)) == (10, (1, 0), 1)


def step(base: Base, adapter: Adapter, row: Row) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = loss_sum(base, row)
    loss.backward()
    return loss.detach(), gradients(adapter)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "fast", [frozenset({"attention", "head", "linear layers"}), frozenset()], ids=["fast", "plain"]
)
@pytest.mark.parametrize("family", PACKED)
def test_sharing_changes_no_loss_and_no_gradient(family: str, fast: frozenset[str]) -> None:
    base, adapter = adapted(family)
    base.fast_parts = fast
    total = sum(e.weight for e in TREE)
    loss, wanted = step(base, adapter, flatten(TREE, total))
    shared, found = step(base, adapter, flatten(TREE, total, share=True))
    assert distance(shared, loss) < 1e-10
    assert not far_apart(found, wanted, 1e-10)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", PACKED)
def test_losses_of_single_tokens_are_each_examples_own(family: str) -> None:
    base, _adapter = adapted(family)
    row = flatten(TREE, 1.0, share=True)
    for example, losses in zip(TREE, token_losses(base, row).split(row.counts), strict=True):
        assert distance(losses, token_losses(base, flatten([example], 1.0))) < 1e-12


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_row_filled_up_has_the_same_loss_and_gradients(family: str) -> None:
    base, adapter = adapted(family)
    loss, wanted = step(base, adapter, flatten(TREE, 9.0, share=True))
    row = flatten(TREE, 9.0, share=True, multiple=32)
    assert (row.tokens, row.spans[-1].length, row.spans[-1].parent) == (64, 64 - 57, -1)
    assert int(row.at_N.max()) < 57
    filled, found = step(base, adapter, row)
    assert distance(filled, loss) < 1e-12
    assert not far_apart(found, wanted, 1e-12)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 1), (torch.bfloat16, 32)])
def test_rows_are_filled_up_for_bfloat16_on_a_cpu(dtype: torch.dtype, multiple: int) -> None:
    base, adapter = adapted("llama", dtype)
    base.adapters["default"] = adapter
    row = row_of(base, TREE, 1.0, "default")
    assert row.tokens == (64 if multiple == 32 else 57)
    assert bool(loss_sum(base, row).isfinite())


DROPPING = {"lora_dropout": 0.1}
SWITCHES: dict[str, tuple[str, dict[str, float], Callable[[Base], object], str | None, bool]] = {
    "as it is": ("llama", {}, lambda base: base, "default", True),
    "dropout": ("llama", DROPPING, lambda base: base, "default", False),
    "dropout, in eval": ("llama", DROPPING, lambda base: base.model.eval(), "default", True),
    "dropout, without the adapter": ("llama", DROPPING, lambda base: base, None, True),
    "switched off": ("llama", {}, lambda base: setattr(base, "fast_parts", frozenset()), "default", False),
    "padded": ("bloom", {}, lambda base: base, "default", False),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_when_prefixes_are_shared(case: str) -> None:
    family, options, change, name, shared = SWITCHES[case]
    base, adapter = adapted(family, torch.float32, **options)
    base.adapters["default"] = adapter
    change(base)
    row = row_of(base, TREE, 1.0, name)
    assert row.tokens == (57 if shared else 156)
    assert row.slots[0].adapter == name
    assert len(hidden(base, row)) == row.tokens


def test_sharing_with_checkpointing_and_what_is_trained_whole() -> None:
    base, adapter = adapted("llama", modules_to_save=("lm_head", "input_layernorm"))
    loss, wanted = step(base, adapter, flatten(TREE, 9.0))
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    shared, found = step(base, adapter, flatten(TREE, 9.0, share=True))
    assert distance(shared, loss) < 1e-6  # RMSNorm casts to float32
    assert not far_apart(found, wanted, 1e-6)


def test_examples_that_share_nothing_lie_as_without() -> None:
    batch = examples()
    shared, whole = flatten(batch, 1.0, share=True), flatten(batch, 1.0)
    assert shared.spans == whole.spans
    assert torch.equal(shared.ids_T, whole.ids_T)
    assert torch.equal(shared.at_N, whole.at_N)
