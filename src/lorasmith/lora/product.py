"""Products of many tokens with a frozen weight, in the form that the processor is fastest at. The numbers are the same.

T = tokens, I = inputs, O = outputs
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def product(x_TI: Tensor, w_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x w + bias, [T, O]."""
    pieces = _pieces(len(x_TI), w_IO.shape[1], x_TI)
    out_TO = x_TI.new_empty(len(x_TI), w_IO.shape[1])
    for x, out in zip(x_TI.chunk(pieces), out_TO.chunk(pieces), strict=True):
        if bias_O is None:
            torch.mm(x, w_IO, out=out)
        else:
            torch.addmm(bias_O, x, w_IO, out=out)
    return out_TO


def sum_of_products(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Tensor:
    """x1 w1 + x2 w2 + ..., [T, O], in one buffer."""
    out_TO = product(xs[0], ws[0])
    pieces = _pieces(len(out_TO), out_TO.shape[1], out_TO)
    for x_TI, w_IO in zip(xs[1:], ws[1:], strict=True):
        for x, out in zip(x_TI.chunk(pieces), out_TO.chunk(pieces), strict=True):
            out.addmm_(x, w_IO)
    return out_TO


def _pieces(rows: int, columns: int, like: Tensor) -> int:
    """In how many pieces of rows. Two threads of oneDNN share a tall product of bfloat16 badly: 1.4 to 1.7 times slower
    than in pieces with fewer rows than columns (docs/decisions.md). A rule and no stopwatch: a resumed run must choose
    alike.
    """
    tall = 448 <= columns <= rows <= 2 * columns
    badly_shared = like.dtype == torch.bfloat16 and like.device.type == "cpu" and torch.get_num_threads() == 2
    return rows // columns + 1 if tall and badly_shared else 1


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [T, O1], [T, O2], ... as one [T, O]: without a copy where they are the columns of one buffer already."""
    first, widths = parts[0], [part.shape[1] for part in parts]
    column, columns = first.storage_offset(), True
    for part in parts:
        columns = (
            columns
            and share_memory(part, first)
            and part.storage_offset() == column
            and part.stride() == (sum(widths), 1)
        )
        column += part.shape[1]
    return (
        first.as_strided((len(first), sum(widths)), (sum(widths), 1), first.storage_offset())
        if columns
        else torch.cat(list(parts), dim=1)
    )


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are parts of one buffer."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
