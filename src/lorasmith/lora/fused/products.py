"""Matrix products with a frozen weight, in the layout that the processor computes fastest.

T = tokens, I = inputs, O = outputs
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_TOKENS = 64  # up to this many tokens, W x^T is up to twice as fast as x W^T on a CPU


def product_of_few(x_TI: Tensor, W_OI: Tensor) -> Tensor:
    """x W^T for at most FEW_TOKENS tokens: [T, O], column-major."""
    tokens = len(x_TI)
    if tokens == 1 and x_TI.dtype != torch.float32:
        x_TI = x_TI.expand(2, -1)  # oneDNN is twice as slow for a single vector as for two
    return torch.mm(W_OI, x_TI.t())[:, :tokens].t()


def prepacked(W_OI: Tensor) -> Tensor | None:
    """W in oneDNN's packed format for `product_of_packed`, which takes half the time or less for few tokens.

    None if this processor, device or dtype does not support it, or if its result is wrong. The operators are those that
    torch.compile uses for frozen weights.
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
    """x W^T + bias [T, O], for W from `prepacked` or a plain one."""
    out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, W_OI, bias_O, "none", [], "")
    return out_TO


def product(x_TI: Tensor, w_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x w + bias [T, O]."""
    pieces = _pieces(len(x_TI), w_IO.shape[1], x_TI)
    out_TO = x_TI.new_empty(len(x_TI), w_IO.shape[1])
    for x, out in zip(x_TI.chunk(pieces), out_TO.chunk(pieces), strict=True):
        if bias_O is None:
            torch.mm(x, w_IO, out=out)
        else:
            torch.addmm(bias_O, x, w_IO, out=out)
    return out_TO


def sum_of_products(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Tensor:
    """x1 w1 + x2 w2 + ... [T, O], accumulated in one buffer."""
    out_TO = product(xs[0], ws[0])
    pieces = _pieces(len(out_TO), out_TO.shape[1], out_TO)
    for x_TI, w_IO in zip(xs[1:], ws[1:], strict=True):
        for x, out in zip(x_TI.chunk(pieces), out_TO.chunk(pieces), strict=True):
            out.addmm_(x, w_IO)
    return out_TO


def _pieces(rows: int, columns: int, like: Tensor) -> int:
    """Number of row blocks to compute separately.

    With two threads, oneDNN is 1.4 to 1.7 times slower on a tall bfloat16 product than on blocks with fewer rows than
    columns (docs/decisions.md). A fixed rule rather than a measurement, so that a resumed run makes the same choice.
    """
    tall = 448 <= columns <= rows <= 2 * columns
    badly_shared = like.dtype == torch.bfloat16 and like.device.type == "cpu" and torch.get_num_threads() == 2
    return rows // columns + 1 if tall and badly_shared else 1


def concat_columns(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [T, O1], [T, O2], ... to [T, O], without a copy if they already are the columns of one buffer."""
    whole = adjacent(parts, dim=1)
    return torch.cat(list(parts), dim=1) if whole is None else whole


def adjacent(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The contiguous tensor of which `parts` are consecutive slices along `dim`, or None if they are not adjacent."""
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
    """Whether two tensors share a storage."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
