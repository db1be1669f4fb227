"""Attention by hand equals torch's own, and both the formula, on any tree of spans."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.model import groups as groups_module
from lorasmith.model.attention import _by_hand, _plainly
from lorasmith.model.groups import attention_groups
from lorasmith.model.row import Span
from tests.support.families import distance
from tests.support.trees import path, trees

CPU = torch.device("cpu")
D = 4
Attend = Callable[..., Tensor]


def tensors(tokens: int, heads: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads[0], D), (tokens, heads[1], D), (tokens, heads[1], D), (tokens, heads[0], D)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_(i < 3) for i, t in enumerate(made)]


def run(attend: Attend, qkvd: Sequence[Tensor], *how: Any) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, direction = qkvd
    out = attend(*qkv, *how)
    return [out.detach(), *torch.autograd.grad(out, qkv, direction)]


def formula(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scaling: float, window: int | None) -> Tensor:
    """softmax(scaling q k^T) v with a mask for the whole row, from the spans alone."""
    mask, position = torch.zeros(len(q), len(q), dtype=torch.bool), torch.zeros(len(q), dtype=torch.long)
    for i, span in enumerate(spans):
        own = path(spans, i)
        position[own] = torch.arange(len(own))
        for place in range(span.start, span.end):
            mask[place, own] = True
    distance = position[:, None] - position
    mask &= (distance >= 0) & (distance < (window or len(q)))
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) * scaling
    P_HQK = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", P_HQK, v.repeat_interleave(repeat, 1))


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert distance(found[0], wanted[0]) < 1e-12
    largest = max(float(w.abs().max()) for w in wanted[1:])  # of a token alone, those of q and k are zero
    assert all(float((f - w).abs().max()) < 1e-10 * largest for f, w in zip(found[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("piece", [5, 256])
@settings(deadline=None, max_examples=40)
@given(
    spans=trees(),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 3, 7]),
    product=st.sampled_from([1, 64, 2**18]),
)
def test_by_hand_equals_torchs_own_and_the_formula(
    piece: int, spans: tuple[Span, ...], heads: tuple[int, int], window: int | None, product: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "QUERY_BLOCK", piece)
        patch.setattr(groups_module, "MAX_PRODUCT", product)
        qkvd, groups, how = tensors(spans[-1].end, heads), attention_groups(spans, CPU), (0.4, window)
        wanted = run(lambda q, k, v: formula(q, k, v, spans, *how), qkvd)
        assert_alike(run(_plainly, qkvd, groups, *how), wanted)
        assert_alike(run(_by_hand, qkvd, groups, *how), wanted)


@pytest.mark.parametrize("attend", [_by_hand, _plainly], ids=["by hand", "torch's own"])
def test_queries_that_are_no_tokens_hand_no_gradient_on(attend: Attend) -> None:
    """A group of 16 queries for 2 tokens behind 30: with a window of 4, the last of them are behind all keys."""
    out = run(attend, tensors(32, (1, 1)), attention_groups((Span(0, 30), Span(30, 32, parent=0)), CPU), 0.4, 4)
    assert all(bool(t.isfinite().all()) for t in out)


def test_every_token_by_the_book() -> None:
    """Two endings of one beginning, a window of two, one head: the sums written out."""
    spans = (Span(0, 2), Span(2, 4, parent=0), Span(4, 5, parent=0))
    sees = {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3], 4: [1, 4]}
    q, k, v = (t.detach() for t in tensors(5, (1, 1))[:3])
    out = _by_hand(q, k, v, attention_groups(spans, CPU), 0.5, 2)
    for token, keys in sees.items():
        e = [math.exp(0.5 * sum(float(a) * float(b) for a, b in zip(q[token, 0], k[j, 0], strict=True))) for j in keys]
        for d in range(D):
            wanted = sum(weight * float(v[j, 0, d]) for weight, j in zip(e, keys, strict=True)) / sum(e)
            assert float(out[token, 0, d]) == pytest.approx(wanted, rel=1e-14)


TREE = (Span(0, 9), Span(9, 14, parent=0), Span(14, 31, parent=0), Span(31, 40), Span(40, 48, parent=1))
FOLLOW = {0: {0, 1, 2, 4}, 1: {1, 4}, 2: {2}, 3: {3}, 4: {4}}  # whose outputs may follow the tokens of a span


@pytest.mark.parametrize("attend", [_by_hand, _plainly], ids=["by hand", "torch's own"])
@pytest.mark.parametrize("changed", range(len(TREE)))
def test_no_bit_follows_the_tokens_of_another_example(
    changed: int, attend: Attend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "QUERY_BLOCK", 6)
    groups, qkv = attention_groups(TREE, CPU), [t.detach() for t in tensors(48, (4, 2))[:3]]
    before = attend(*qkv, groups, 0.4, None)
    others = [t.clone() for t in qkv]
    for t, new in zip(others, tensors(48, (4, 2), seed=1)[:3], strict=True):
        t[TREE[changed].start : TREE[changed].end] = new[TREE[changed].start : TREE[changed].end].detach()
    after = attend(*others, groups, 0.4, None)
    for i, span in enumerate(TREE):
        same = torch.equal(after[span.start : span.end], before[span.start : span.end])
        assert same == (i not in FOLLOW[changed])


@pytest.mark.parametrize("attend", [_by_hand, _plainly], ids=["by hand", "torch's own"])
@pytest.mark.parametrize("asked", range(len(TREE)))
def test_no_gradient_reaches_the_tokens_of_another_example(
    asked: int, attend: Attend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "QUERY_BLOCK", 6)
    *qkv, _direction = tensors(48, (4, 2))
    out = attend(*qkv, attention_groups(TREE, CPU), 0.4, None)
    gradients = torch.autograd.grad(out[TREE[asked].start : TREE[asked].end].sum(), qkv)
    for i, span in enumerate(TREE):
        reached = any(bool(g[span.start : span.end].any()) for g in gradients[1:])
        assert reached == (asked in FOLLOW[i])
        assert bool(gradients[0][span.start : span.end].any()) == (i == asked)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "QUERY_BLOCK", 4)
    groups = attention_groups((Span(0, 5), Span(5, 7, parent=0)), CPU)
    assert torch.autograd.gradcheck(lambda *qkv: _by_hand(*qkv, groups, 0.7, 3), tensors(7, (2, 1))[:3])


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_a_long_example_never_has_all_its_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "QUERY_BLOCK", 16)
    monkeypatch.setattr(groups_module, "MAX_PRODUCT", 1024)
    groups = attention_groups((Span(0, 512),), CPU)
    with Largest() as largest:
        run(_by_hand, tensors(512, (1, 1)), groups, 0.4, None)
    assert largest.size == 16 * 512, "one piece of queries against all keys; all against all would be 262,144"


def test_bfloat16_rounds_like_torchs_own() -> None:
    spans = (Span(0, 9), Span(9, 20, parent=0), Span(20, 33))
    qkvd = tensors(33, (4, 2), dtype=torch.bfloat16)
    groups = attention_groups(spans, CPU)
    for ours, plain in zip(run(_by_hand, qkvd, groups, 0.4, None), run(_plainly, qkvd, groups, 0.4, None), strict=True):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, plain) < 3e-2  # 8 bits: a rounding is 2^-8, and there are a few of them


def test_second_derivative_is_refused_rather_than_wrong() -> None:
    q, k, v, _direction = tensors(4, (1, 1))
    out = _by_hand(q, k, v, attention_groups((Span(0, 4),), CPU), 0.5, None).square().sum()
    (g,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
