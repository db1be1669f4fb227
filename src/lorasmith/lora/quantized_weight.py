"""Frozen weights that are stored in 4 or 8 bits, in the number formats of bitsandbytes.

    NF4: blocks of 64 numbers, each 4 bits and scaled by its block's maximum    (QLoRA, arXiv:2305.14314, section 3)
    int8: a row's numbers times 127 over its maximum, rounded                   (LLM.int8(), arXiv:2208.07339)

A product converts the weight to the dtype of computation, one piece at a time, and again in backward: nothing converted
is kept.

    T = tokens, I = in_features, O = out_features
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.lora.nf4 import quantize_blocks
from lorasmith.system.bitsandbytes import bitsandbytes

Format = Literal["nf4", "int8"]
PIECE = 2**24  # numbers that are converted at a time: 32 MiB in bfloat16
STEP = 2**20  # numbers that bitsandbytes converts at a time; a multiple of every block size
ALIGNMENT = 64  # torch's kernel for int8 crashes with inputs at other addresses, and is wrong for rows of other lengths
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # for others bitsandbytes gives back uninitialized memory
FEW = 16  # tokens up to which a product takes less time than converting the weight
BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale, and scales that share one; bitsandbytes' defaults


_rooms = threading.local()


def room(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory, on a CPU the same again and again.

    Otherwise what is kept for backward would be allocated inside what the last piece freed, so that the next piece does
    not fit there: memory would grow by a piece for each layer.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    found: Tensor | None = getattr(_rooms, str(dtype), None)
    if found is None or found.numel() < rows * columns:
        with torch.inference_mode(False):
            found = torch.empty(rows * columns, dtype=dtype)
        setattr(_rooms, str(dtype), found)
    return found[: rows * columns].view(rows, columns)


class QuantizedWeight(nn.Module):
    """A quantized matrix [O, I], for products in `dtype`. Moves between devices with its module."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    def rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """The rows [start, end) in `dtype`, each divided by its number in `scales` if there are any.

        They are valid until the next call in this thread.
        """
        raise NotImplementedError

    @property
    def scales(self) -> Tensor | None:
        """A factor for each row [O], or None. A product applies it to its output, which is faster."""
        return None

    def pieces(self, tokens: int | None = None) -> Iterator[tuple[int, int]]:
        """Bounds of the row ranges that are converted at a time, for a product with so many tokens."""
        few = tokens is not None and tokens <= FEW and self.device.type == "cpu"
        height = max(1, (STEP if few else PIECE) // self.shape[1])
        for start in range(0, self.shape[0], height):
            yield start, min(start + height, self.shape[0])

    def product(self, x_TI: Tensor, out_TO: Tensor) -> Tensor:
        """out = x W^T."""
        for start, end in self.pieces(len(x_TI)):
            torch.mm(x_TI, self.rows(start, end, x_TI.dtype).t(), out=out_TO[:, start:end])
        return out_TO if self.scales is None else out_TO.mul_(self.scales.to(out_TO.dtype))

    def add_product(self, dy_TO: Tensor, out_TI: Tensor) -> Tensor:
        """out += dy W."""
        scaled_TO = dy_TO if self.scales is None else dy_TO * self.scales.to(dy_TO.dtype)
        for start, end in self.pieces():
            out_TI.addmm_(scaled_TO[:, start:end], self.rows(start, end, dy_TO.dtype))
        return out_TI

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole matrix [O, I], by default in the dtype of computation."""
        dtype = dtype or self.dtype
        wide = torch.promote_types(dtype, torch.float32)
        out_OI = torch.empty(self.shape, dtype=dtype, device=self.device)
        for start, end in self.pieces():
            out_OI[start:end] = self._scaled(start, end, wide)
        return out_OI

    def at(self, ids: Tensor) -> Tensor:
        """The rows with these numbers, [..., I]."""
        raise NotImplementedError

    @torch.no_grad()
    def is_from(self, W_OI: Tensor) -> bool:
        """Whether quantizing W gives these values."""
        if W_OI.shape != self.shape:
            return False
        other = self.quantize(W_OI.to(self.device, self.dtype), self.dtype)
        return all(map(torch.equal, self.buffers(), other.buffers()))

    @classmethod
    def quantize(cls, W_OI: Tensor, dtype: torch.dtype) -> "QuantizedWeight":
        """Quantize W [O, I], a piece at a time, for products in `dtype`."""
        raise NotImplementedError

    def _scaled(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        rows = self.rows(start, end, dtype)
        return rows if self.scales is None else rows * self.scales[start:end, None].to(dtype)


class Int8Weight(QuantizedWeight):
    """Whole numbers from -127 to 127, [O, I], and a float32 factor for each row."""

    values_OI: Tensor
    scales_O: Tensor

    def __init__(self, values_OI: Tensor, maxima_O: Tensor, dtype: torch.dtype) -> None:
        super().__init__(values_OI.shape, dtype)
        self.register_buffer("values_OI", values_OI)
        self.register_buffer("scales_O", maxima_O.float() / 127)

    @classmethod
    def quantize(cls, W_OI: Tensor, dtype: torch.dtype) -> "Int8Weight":
        """Round W, a piece at a time. In half precision before, as bitsandbytes does."""
        quantize = bitsandbytes().functional.int8_vectorwise_quant
        values_OI, maxima_O = torch.empty_like(W_OI, dtype=torch.int8), W_OI.new_empty(len(W_OI), dtype=torch.float32)
        step = max(1, PIECE // 8 // W_OI.shape[1])
        for part, into, maxima in zip(*(t.split(step) for t in (W_OI, values_OI, maxima_O)), strict=True):
            found = quantize(part.half())
            into.copy_(found[0])
            maxima.copy_(found[1])
        return cls(values_OI, maxima_O, dtype)

    @property
    def scales(self) -> Tensor:
        """The factors [O]."""
        return self.scales_O

    def rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """The whole numbers, which every float dtype represents exactly."""
        return room(end - start, self.shape[1], dtype, self.device).copy_(self.values_OI[start:end])

    def product(self, x_TI: Tensor, out_TO: Tensor) -> Tensor:
        """out = x W^T. For few tokens, torch has a kernel that reads the whole numbers; it is fast in bfloat16 only."""
        few = len(x_TI) <= FEW and x_TI.device.type == "cpu" and x_TI.dtype == torch.bfloat16
        if not few or self.shape[1] % ALIGNMENT or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return super().product(x_TI, out_TO)
        x_TI = x_TI.contiguous()
        if x_TI.data_ptr() % ALIGNMENT:
            x_TI = x_TI.clone()
        found: Tensor = torch.ops.aten._weight_int8pack_mm(x_TI, self.values_OI, self.scales.to(x_TI.dtype))
        return out_TO.copy_(found)

    def at(self, ids: Tensor) -> Tensor:
        """The rows with these numbers, [..., I]."""
        return (F.embedding(ids, self.values_OI).float() * self.scales_O[ids][..., None]).to(self.dtype)


class FourBitWeight(QuantizedWeight):
    """Two numbers a byte. With `nested_*`, the scales of the blocks are quantized too ("double quantization")."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(self, packed: Tensor, state: Any, dtype: torch.dtype) -> None:
        super().__init__(state.shape, dtype)
        self.kind, self.block = str(state.quant_type), int(state.blocksize)
        nested = state.state2 if state.nested else None
        self.nested_block = int(nested.blocksize) if nested else 0
        self.register_buffer("packed", packed.view(torch.uint8).reshape(-1, 1))
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("nested_absmax", nested.absmax if nested else None)
        self.register_buffer("nested_code", nested.code if nested else None)
        self.register_buffer("offset", state.offset if nested else None)

    @classmethod
    def quantize(cls, W_OI: Tensor, dtype: torch.dtype) -> "FourBitWeight":
        """Quantize W to NF4 with double quantization, a piece at a time."""
        F4, numbers = bitsandbytes().functional, W_OI.reshape(-1)
        packed, maxima = numbers.new_empty(-(-len(numbers) // 2), 1, dtype=torch.uint8), []
        step = max(1, PIECE // 8 // BLOCK) * BLOCK  # no block is in two pieces
        for part, into in zip(numbers.split(step), packed.split(step // 2), strict=True):
            found, part_absmax = _nf4(part)
            into.copy_(found)
            maxima.append(part_absmax)
        absmax = torch.cat(maxima)
        offset = absmax.mean()
        absmax, nested = F4.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        state = F4.QuantState(absmax, W_OI.shape, None, BLOCK, "nf4", W_OI.dtype, offset, nested)
        return cls(packed, state, dtype)

    def rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """The rows in `dtype`. As a matrix of blocks: on a CPU, rows that end within a block come out wrong in 0.50."""
        absmax, first, last = self._absmax(), start * self.shape[1], end * self.shape[1]
        if last - first <= STEP:
            return self._numbers(first, last, absmax, dtype).view(end - start, -1)
        out = room(end - start, self.shape[1], dtype, self.device)
        flat = out.view(-1)
        for low in range(first, last, STEP):
            high = min(low + STEP, last)
            flat[low - first : high - first] = self._numbers(low, high, absmax, dtype)
        return out

    def _numbers(self, low: int, high: int, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers [low, high), which begin with a block."""
        bitsandbytes()
        packed, scales = self.packed[low // 2 : -(-high // 2)], absmax[low // self.block : -(-high // self.block)]
        numbers = high - low
        shape = [1, numbers] if numbers % self.block else [numbers // self.block, self.block]
        known = dtype if dtype in DTYPES else torch.float32
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, self.block, self.kind, shape, known)
        return found.view(-1).to(dtype)

    def pieces(self, tokens: int | None = None) -> Iterator[tuple[int, int]]:
        """Bounds of the row ranges; all rows if a block of numbers may be in two of them."""
        yield from super().pieces(tokens) if self.shape[1] % self.block == 0 else [(0, self.shape[0])]

    def at(self, ids: Tensor) -> Tensor:
        """The rows with these numbers, [..., I]."""
        return F.embedding(ids, self.dequantized())

    def _absmax(self) -> Tensor:
        """The scale of each block, in float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax.float()
        absmax: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.nested_absmax, self.nested_code, self.nested_block, torch.float32
        )
        return absmax.add_(self.offset)


def _nf4(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers a byte, and each block's maximum in float32."""
    if numbers.device.type == "cpu" and len(numbers) % BLOCK == 0:
        return quantize_blocks(numbers, BLOCK)
    quantize_4bit = bitsandbytes().functional.quantize_4bit
    packed, state = quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return packed, state.absmax


@torch.no_grad()
def quantize(W_OI: Tensor, form: Format, dtype: torch.dtype) -> QuantizedWeight:
    """W [O, I] in this format, for products in `dtype`."""
    kind = FourBitWeight if form == "nf4" else Int8Weight
    return kind.quantize(W_OI.float() if W_OI.dtype == torch.float64 else W_OI, dtype)
