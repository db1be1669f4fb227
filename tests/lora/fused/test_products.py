"""Products in pieces and side by side: the same numbers in another form."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.lora.fused import products as product_module
from lorasmith.lora.fused.products import concat_columns, product, share_memory, sum_of_products
from tests.support.families import distance

ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of one sum, in another order
T, I, O = 37, 24, 16


def in_pieces(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    monkeypatch.setattr(product_module, "_pieces", lambda rows, columns, like: pieces)


def matrices(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 36])
@pytest.mark.parametrize("bias", [False, True])
def test_pieces_equal_the_whole(bias: bool, pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = matrices((T, I), (I, O), dtype=dtype)
    b = torch.randn(O, dtype=torch.float64).to(dtype) if bias else None
    whole = product(x, w, b)
    in_pieces(monkeypatch, pieces)
    ours = product(x, w, b)
    assert (ours.shape, ours.dtype) == ((T, O), dtype)
    assert distance(ours, whole) <= ROUNDING[dtype]
    wanted = x.double() @ w.double() + (0 if b is None else b.double())
    assert distance(ours, wanted) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pieces", [1, 3])
def test_sum_of_products(pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, pieces)
    xs, ws = matrices((T, 5), (T, 3), (T, 9), dtype=dtype), matrices((5, O), (3, O), (9, O), dtype=dtype)
    wanted = torch.cat(xs, 1).double() @ torch.cat(ws).double()
    assert distance(sum_of_products(xs, ws), wanted) <= 3 * ROUNDING[dtype]  # bfloat16 rounds after each of the three
    assert distance(sum_of_products(xs[:1], ws[:1]), xs[0].double() @ ws[0].double()) <= ROUNDING[dtype]


def test_inputs_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, 3)
    xs, ws = matrices((T, 5), (T, 3)), matrices((5, O), (3, O))
    before = [t.clone() for t in (*xs, *ws)]
    sum_of_products(xs, ws)
    assert all(torch.equal(t, was) for t, was in zip((*xs, *ws), before, strict=True))


def test_parts_of_wider_matrices_are_multiplied_in_place() -> None:
    """As backward has them: columns of one gradient, rows of one weight, a transposed weight."""
    dy, w = matrices((T, 12), (12, O))
    parts = sum_of_products(dy.split([7, 5], dim=1), w.split([7, 5]))
    assert distance(parts, dy @ w) < 1e-14
    (x,) = matrices((T, O))
    assert distance(product(x, w.t()), x @ w.t()) < 1e-14


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [
        (512, 512, 2),  # square: two pieces of 256 rows
        (1000, 576, 2),
        (1152, 576, 3),
        (1153, 576, 1),  # more than twice as tall
        (500, 576, 1),  # wide
        (447, 447, 1),  # small
    ],
)
def test_tall_products_of_bfloat16_are_cut_for_two_threads(
    rows: int, columns: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert product_module._pieces(rows, columns, like) == wanted
    assert wanted == 1 or -(-rows // wanted) < columns, "each piece is wider than tall"
    assert product_module._pieces(rows, columns, like.float()) == 1
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert product_module._pieces(rows, columns, like) == 1


# --- side by side -----------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts what is put together by copying."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "cat"
        return func(*args, **(kwargs or {}))


def columns(*widths: int) -> tuple[Tensor, Sequence[Tensor]]:
    (whole,) = matrices((T, sum(widths)))
    return whole, whole.split(widths, dim=1)


@pytest.mark.parametrize("widths", [(7,), (7, 5), (1, 1, 1), (8, 4, 4)])
def test_columns_of_one_buffer_need_no_copy(widths: tuple[int, ...]) -> None:
    whole, parts = columns(*widths)
    with Copies() as copies:
        out = concat_columns(parts)
    assert torch.equal(out, whole)
    assert (out.data_ptr(), out.stride(), copies.count) == (whole.data_ptr(), whole.stride(), 0)


def test_columns_further_inside_a_buffer_need_no_copy() -> None:
    """Parts of the lower half of the rows."""
    (buffer,) = matrices((2 * T, 12))
    lower = buffer[T:]
    out = concat_columns(lower.split([7, 5], dim=1))
    assert torch.equal(out, lower)
    assert share_memory(out, buffer)


COPIED: dict[str, Callable[[], Sequence[Tensor]]] = {
    "buffers of their own": lambda: matrices((T, 7), (T, 5)),
    "another order": lambda: columns(7, 5)[1][::-1],
    "a gap": lambda: columns(7, 2, 5)[1][::2],
    "not all columns": lambda: columns(7, 5, 1)[1][:2],
    "not the first columns": lambda: columns(1, 7, 5)[1][1:],
    "the same twice": lambda: [columns(7)[1][0]] * 2,
    "columns first": lambda: [t.t() for t in matrices((7, T), (5, T))],
    "another buffer of the same layout": lambda: (columns(7, 5)[1][0], columns(7, 5)[1][1]),
}


@pytest.mark.parametrize("case", COPIED)
def test_everything_else_is_copied(case: str) -> None:
    parts = COPIED[case]()
    with Copies() as copies:
        out = concat_columns(parts)
    assert torch.equal(out, torch.cat(list(parts), dim=1))
    assert copies.count == 1


def test_rows_shifted_inside_one_buffer_are_copied() -> None:
    """The same buffer and strides, but the second part begins a row later."""
    (whole,) = matrices((T + 1, 12))
    parts = whole[:T, :7], whole[1:, 7:]
    assert torch.equal(concat_columns(parts), torch.cat(parts, dim=1))


def test_share_memory() -> None:
    a, b = matrices((3, 4), (3, 4))
    assert share_memory(a, a[1:, ::2].t())
    assert not share_memory(a, b)
    assert not share_memory(a, a.clone())
