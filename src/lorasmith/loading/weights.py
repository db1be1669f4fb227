"""How transformers reads a checkpoint whose dtype is not the wanted one: tensor by tensor, each converted and let go.

It maps the file and converts in threads: until all is converted the whole file counts as this program's memory (a base
of 135 million numbers took 1,122 MiB, and takes 615 so), and what threads allocate lies in heaps of their own.
"""

import os
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
_transformers: Any = modeling_utils  # its name for safe_open is not public
_SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"
_one_at_a_time = threading.Lock()


def is_stored_as(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the largest tensor of a checkpoint has `dtype`: then it can stay mapped, uncopied."""
    largest, stored = 0, _STORED.get(dtype)
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(name)
                    if (size := prod(part.get_shape())) > largest:
                        largest, stored = size, part.get_dtype()
        except (OSError, SafetensorError):
            return True  # transformers will say what is wrong with it
    return stored == _STORED.get(dtype)


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads: beside them may lie others, as in clones of Mistral's and Llama's."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in read_object(index, ModelError).get("weight_map", {}).values()})


@contextmanager
def tensor_by_tensor() -> Iterator[None]:
    """Within it transformers reads instead of mapping, as it does on Windows, and without threads."""

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
