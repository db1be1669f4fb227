"""Make transformers read a checkpoint tensor by tensor when its dtype has to be converted, to save memory.

By default transformers maps the file and converts in threads. Until everything is converted, the whole file counts as
memory of the process (for 135 million parameters 1,122 MiB instead of 615), and the threads allocate from heaps of
their own.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import modeling_utils

from lorasmith.config.files import read_object
from lorasmith.errors import ModelError

_STORED = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_transformers: Any = modeling_utils  # safe_open is not part of its public interface
_BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0}  # of a number; in NF4 with the scales of its block
_TABLE = 1024  # bytes of the 256 values that the scales of an NF4 matrix can have
_EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of a weight of one expert
_SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"
_one_at_a_time = threading.Lock()


def is_stored_as(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the largest tensor of a checkpoint has `dtype`, so that the file can stay mapped without a copy."""
    largest, stored = 0, _STORED.get(dtype)
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    part = file.get_slice(name)
                    if (size := prod(part.get_shape())) > largest:
                        largest, stored = size, part.get_dtype()
        except (OSError, SafetensorError):
            return True  # transformers will raise an error that says what is wrong
    return stored == _STORED.get(dtype)


def weights_mib(folder: Path, dtype: torch.dtype, quantize: str = "none") -> float:
    """About how much memory the weights of a checkpoint take in `dtype`, or quantized. Reads only their shapes.

    In a quantized base, every matrix is in this format, and embedding and head in 8 bits. Experts are not quantized:
    transformers puts them into one tensor of three dimensions, also where the file has matrices.
    """
    total, vocabulary = 0.0, read_object(folder / "config.json", ModelError).get("vocab_size")
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    shape = file.get_slice(name).get_shape()
                    form = "int8" if shape[:1] == [vocabulary] and quantize != "none" else quantize
                    is_quantized = len(shape) == 2 and form != "none" and not _EXPERT.search(name)
                    total += prod(shape) * (_BYTES[form] if is_quantized else dtype.itemsize)
                    total += _TABLE if is_quantized and form == "nf4" else 0
        except (OSError, SafetensorError):
            return 0.0  # transformers will raise an error that says what is wrong
    return total / 2**20


def _files(folder: Path) -> list[Path]:
    """The weight files that transformers reads; folders of Mistral and Llama models contain others as well."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in read_object(index, ModelError).get("weight_map", {}).values()})


@contextmanager
def tensor_by_tensor() -> Iterator[None]:
    """Make transformers read files instead of mapping them, as on Windows, and without threads, inside the block."""

    def read(*args: Any, **options: Any) -> Any:
        return safe_open(*args, **(options | {"backend": "pread"}))

    with _one_at_a_time:
        before, _transformers.safe_open = os.environ.get(_SYNCHRONOUS), read
        os.environ[_SYNCHRONOUS] = "1"
        try:
            yield
        finally:
            _transformers.safe_open = safe_open
            if before is None:
                os.environ.pop(_SYNCHRONOUS, None)
            else:
                os.environ[_SYNCHRONOUS] = before
