"""Products of many tokens with a frozen weight, in the form that the processor is fastest at. The numbers are the same.

T = tokens, I = inputs, O = outputs
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 64  # tokens: up to so many, W x^T is up to twice as fast as x W^T on a CPU


def product_of_few(x_TI: Tensor, W_OI: Tensor) -> Tensor:
    """x W^T for at most FEW tokens, [T, O], whose columns lie next to each other in memory."""
    tokens = len(x_TI)
    if tokens == 1 and x_TI.dtype != torch.float32:
        x_TI = x_TI.expand(2, -1)  # oneDNN reads a matrix for one vector half as fast as for two
    return torch.mm(W_OI, x_TI.t())[:, :tokens].t()


def prepacked(W_OI: Tensor) -> Tensor | None:
    """W in the order that oneDNN reads it in, for `product_of_packed`: few tokens take half as long, or less.

    None where this processor, device or dtype has no such product, or it gives something else altogether. The operators
    are those that torch.compile freezes weights with.
    """
    if W_OI.device.type != "cpu" or W_OI.dtype not in (torch.float32, torch.bfloat16):
        return None
    x_TI = torch.linspace(-1, 1, 3 * W_OI.shape[1], dtype=torch.float32).view(3, -1).to(W_OI.dtype)
    expected = F.linear(x_TI, W_OI)
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(W_OI.contiguous())
        found = product_of_packed(x_TI, packed)
    except (AttributeError, RuntimeError):
        return None
    limit = 16 * torch.finfo(W_OI.dtype).eps * float(expected.abs().max())
    return packed if float((found - expected).abs().max()) <= limit else None


def product_of_packed(x_TI: Tensor, W_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias, [T, O]; W prepacked or not."""
    out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, W_OI, bias_O, "none", [], "")
    return out_TO


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
    whole = joined(parts, dim=1)
    return torch.cat(list(parts), dim=1) if whole is None else whole


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The contiguous tensor whose pieces along `dim` these are, one after the other; None where there is none."""
    first, shape = parts[0], list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    stride = [prod(shape[i + 1 :]) for i in range(len(shape))]
    at = first.storage_offset()
    for part in parts:
        if not share_memory(part, first) or part.storage_offset() != at or list(part.stride()) != stride:
            return None
        at += part.shape[dim] * stride[dim]
    return first.as_strided(shape, stride, first.storage_offset())


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are parts of one buffer."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
